"""dagpath: the neuron graph of any PyTorch ReLU network, its path quantities, and the rescaling that balances it."""

from dagpath import optim
from dagpath.apply.rescaling import Rescaling
from dagpath.balance import balance, random_rescaling
from dagpath.checkpoint import rescale_checkpoint
from dagpath.criteria import EquiNorm, PathConditioning, RangeEqualization
from dagpath.errors import BalanceError, CaptureError, DagpathError, UnsupportedOpError, VerificationError
from dagpath.graph import NeuronGraph
from dagpath.graph.unrolled import UnrolledGraph
from dagpath.lifting import (
    GramOperator,
    expected_gram_diagonal,
    gram,
    gram_diagonal,
    path_count,
    path_length_profile,
    path_mass,
    path_metric,
    path_norm,
)
from dagpath.ops import register_op
from dagpath.page import html_report
from dagpath.paths import Path, PathLifting
from dagpath.paths.conserved import conserved_quantities
from dagpath.paths.top import ChannelPath, top_paths
from dagpath.rescale import rescale_
from dagpath.trace import TracedModel, trace

__version__ = "0.1.0"

__all__ = [
    "BalanceError",
    "CaptureError",
    "ChannelPath",
    "DagpathError",
    "EquiNorm",
    "GramOperator",
    "NeuronGraph",
    "Path",
    "PathConditioning",
    "PathLifting",
    "RangeEqualization",
    "Rescaling",
    "TracedModel",
    "UnrolledGraph",
    "UnsupportedOpError",
    "VerificationError",
    "balance",
    "conserved_quantities",
    "expected_gram_diagonal",
    "gram",
    "gram_diagonal",
    "html_report",
    "optim",
    "path_count",
    "path_length_profile",
    "path_mass",
    "path_metric",
    "path_norm",
    "random_rescaling",
    "register_op",
    "rescale_",
    "rescale_checkpoint",
    "top_paths",
    "trace",
]
