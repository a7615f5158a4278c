"""The operations dagpath knows, one file per family; importing this package registers them all.

What a rule of one's own needs stands here too: the base class, and the types of what it is given.
"""

from dagpath.flow.neurons import NeuronFlow
from dagpath.flow.paths import Gate, PathFlow
from dagpath.flow.values import FIXED, ZERO, Call, Operand, Weight
from dagpath.ops import (  # noqa: F401 (which registers their operations)
    attention,
    compound,
    elementwise,
    indexing,
    linear,
    movement,
    normalization,
    pooling,
    resample,
)
from dagpath.ops.base import Operation, registered
from dagpath.ops.user import register_op

__all__ = [
    "FIXED",
    "ZERO",
    "Call",
    "Gate",
    "NeuronFlow",
    "Operand",
    "Operation",
    "PathFlow",
    "Weight",
    "register_op",
    "registered",
]
