"""Numbers and the nouns behind them agree, in every report."""

import pytest
import torch
from torch import nn

import dagpath
from dagpath.paths.basis import basis_paths

from networks import Net


def small(free=1, outputs=1):
    layers = nn.Linear(1, free, bias=False), nn.ReLU(), nn.Linear(free, outputs, bias=False)
    return dagpath.trace(nn.Sequential(*layers), torch.zeros(1, 1))


def test_one_of_each_is_singular():
    traced = small()
    assert repr(traced.graph) == "NeuronGraph(2 neurons, 1 free group, 2 parameters)"
    assert traced.explain().startswith("Sequential: 2 neurons, 1 free in 1 group, 1 fixed; 2 parameters\n")
    assert repr(dagpath.PathLifting(traced)) == "PathLifting(1 path, at most 3 edges long)"
    assert repr(basis_paths(traced)) == "BasisPaths(1 path of 2 parameters)"


def test_one_neuron_of_one_parameter_is_singular():
    traced = dagpath.trace(nn.Linear(1, 1, bias=False), torch.zeros(1, 1))
    assert repr(traced.graph) == "NeuronGraph(1 neuron, 0 free groups, 1 parameter)"
    assert "1 neuron, 0 free in 0 groups, 1 fixed; 1 parameter\n" in traced.explain()
    assert repr(dagpath.PathLifting(traced)) == "PathLifting(1 path, at most 1 edge long)"
    graph = traced.unroll()
    assert f"{graph.num_edges:,} edge" + "s" * (graph.num_edges != 1) + "," in repr(graph)


def test_several_are_plural():
    traced = small(free=3, outputs=2)
    assert repr(traced.graph) == "NeuronGraph(5 neurons, 3 free groups, 9 parameters)"
    assert traced.explain().startswith("Sequential: 5 neurons, 3 free in 3 groups, 2 fixed; 9 parameters\n")
    assert repr(dagpath.PathLifting(traced)) == "PathLifting(6 paths, at most 3 edges long)"


def test_one_module_more_than_fits_is_singular():
    modules = [nn.Linear(2, 2) for _ in range(25)]
    traced = dagpath.trace(nn.Sequential(*modules), torch.zeros(1, 2))
    assert "... and 1 more module; explain" in traced.explain()
    traced = dagpath.trace(nn.Sequential(*modules, nn.Linear(2, 2)), torch.zeros(1, 2))
    assert "... and 2 more modules; explain" in traced.explain()


@pytest.mark.parametrize(("count", "words"), [(1, "1 value that is not finite"), (2, "2 values that are not finite")])
def test_values_that_are_not_finite_are_counted(count, words):
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    with torch.no_grad():
        net[0].bias[:count] = torch.nan
    with pytest.raises(dagpath.BalanceError, match=words):
        dagpath.balance(dagpath.trace(net, torch.zeros(1, 2)))


def test_what_stops_short_or_is_held_is_counted():
    net = Net(lambda m, x: m.b(torch.relu(m.a(x))), a=nn.Linear(2, 1), b=nn.Linear(1, 1))
    with torch.no_grad():
        net.a.weight.fill_(100.0)
    traced = dagpath.trace(net, torch.zeros(1, 2))
    with pytest.warns(UserWarning, match="^1 group is held by the bound .*, of 1 in all"):
        dagpath.balance(traced, bound=0.01)
    with pytest.warns(UserWarning, match="after 1 iteration at"):
        dagpath.balance(small(7, 3), "equinorm", solver="coordinate", max_iter=1, tol=1e-300)
