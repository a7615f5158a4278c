"""What is true of every network, on random ones."""

from hypothesis import given, settings

from dags import Dag, Spec, specs
from properties import check_balance, check_engines, check_rescaling, traced_untouched

CRITERIA = ("pathcond", "equinorm", "range")


def check(spec: Spec) -> None:
    """All properties of one network, from one trace."""
    net = Dag(spec)
    inputs = net.example()
    traced = traced_untouched(net, inputs)
    check_rescaling(traced, inputs, seed=spec.seed)
    check_engines(traced, inputs)
    check_balance(traced)
    check_balance(traced, CRITERIA[1 + spec.seed % 2])


@settings(max_examples=200)
@given(specs())
def test_every_property_holds_for_random_networks(spec):
    check(spec)
