"""What is true of every network, on random ones.

``python -m pytest -m fuzz --hypothesis-profile=deep`` tries ten thousand that were never tried before, in a process for
each core.
"""

from __future__ import annotations

import multiprocessing
import random
import warnings
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings

from calls import check_calls, check_trace_again
from dags import Dag, Spec, specs
from properties import check_balance, check_engines, check_rescaling, traced_untouched

CRITERIA = ("pathcond", "equinorm", "range")

_SHARDS, _NETWORKS = 40, 250


def check(spec: Spec) -> None:
    """All properties of one network, from one trace."""
    net = Dag(spec)
    inputs = net.example()
    traced = traced_untouched(net, inputs)
    check_rescaling(traced, inputs, seed=spec.seed)
    check_calls(traced, seed=spec.seed)
    check_engines(traced, inputs)
    check_balance(traced)
    check_balance(traced, CRITERIA[1 + spec.seed % 2])
    if spec.seed % 8 < 2:
        check_trace_again(traced)


@settings(max_examples=140)
@given(specs())
def test_every_property_holds_for_random_networks(spec):
    check(spec)


def check_many(start: int) -> str:
    """Many networks, drawn from a seed; what failed, in words."""
    torch.set_num_threads(1)
    options = settings(max_examples=_NETWORKS, deadline=None, derandomize=False, database=None, print_blob=True)
    options = settings(options, suppress_health_check=list(HealthCheck))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for known in (".*script_method. is deprecated.*", ".*isinstance.treespec, LeafSpec.*"):
            warnings.filterwarnings("ignore", message=known)
        try:
            seed(start)(options(given(specs())(check)))()
        except Exception as error:
            return f"seed {start}: {type(error).__name__}: {error}\n" + "\n".join(getattr(error, "__notes__", ()))
    return ""


@pytest.mark.fuzz
def test_every_property_holds_for_ten_thousand_random_networks():
    draw = random.Random(0) if settings.default.derandomize else random.SystemRandom()
    seeds = [draw.randrange(2**32) for _ in range(_SHARDS)]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        failures = [found for found in pool.map(check_many, seeds) if found]
    assert not failures, "\n\n".join(failures)
