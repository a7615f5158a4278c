"""A rescaling by itself: composed, saved and loaded, and summed up."""

import pytest
import torch
from torch import nn

import dagpath
from dagpath.solver import MassAggregator, Problem, SumOuter

from networks import mlp


def test_rescalings_compose():
    torch.manual_seed(0)
    net = mlp(4, 6, 5, 2).double()
    traced = dagpath.trace(net, torch.zeros(1, 4, dtype=torch.float64))
    a, b = dagpath.random_rescaling(traced), dagpath.random_rescaling(traced)
    expected = [parameter.detach().clone() for parameter in net.parameters()]
    (a @ b).apply_()
    together = [parameter.detach().clone() for parameter in net.parameters()]
    for parameter, value in zip(net.parameters(), expected, strict=True):
        parameter.data.copy_(value)
    b.apply_()
    a.apply_()
    for parameter, value in zip(net.parameters(), together, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-12, atol=0)
    assert torch.equal((a @ a.inverse()).log_scales, torch.zeros(11, dtype=torch.float64))
    for other in (mlp(4, 6, 2), mlp(4, 5, 6, 2), mlp(4, 11, 2)):  # the last two have as many groups
        with pytest.raises(ValueError, match="different neuron graphs"):
            a @ dagpath.random_rescaling(dagpath.trace(other, torch.zeros(1, 4)))
    with pytest.raises(TypeError):
        a @ 2


def test_rescalings_are_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    net = mlp(4, 6, 5, 2)
    traced = dagpath.trace(net, torch.zeros(1, 4))
    for rescaling in (dagpath.balance(traced, power_of_two=True), dagpath.random_rescaling(traced)):
        path = tmp_path / "rescaling.safetensors"
        rescaling.save(path)
        loaded = dagpath.Rescaling.load(path, traced)
        assert torch.equal(loaded.log_scales, rescaling.log_scales)
        assert loaded.summary(layers=True) == rescaling.summary(layers=True)
        assert loaded.power_of_two == rescaling.power_of_two
    for other in (mlp(4, 7, 5, 2), mlp(4, 5, 6, 2), mlp(4, 11, 2)):
        with pytest.raises(ValueError, match="another neuron graph"):
            dagpath.Rescaling.load(path, dagpath.trace(other, torch.zeros(1, 4)))
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="holds no rescaling"):
        dagpath.Rescaling.load(path, traced)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is no safetensors file"):
        dagpath.Rescaling.load(path, traced)


def test_a_rescaling_has_a_factor_for_every_free_group():
    traced = dagpath.trace(mlp(3, 4, 2), torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"log_scales must have shape \(4,\), one for each free group, got \(3,\)"):
        dagpath.Rescaling(traced, torch.zeros(3))


def test_the_summary_by_layers_has_a_row_for_each_layer_with_free_neurons():
    torch.manual_seed(0)
    rescaling = dagpath.balance(dagpath.trace(mlp(4, 6, 5, 2), torch.zeros(1, 4)))
    rows = rescaling.summary(layers=True).split("\n\n")[1].splitlines()
    assert [row.split()[0] for row in rows[2:]] == ["0", "2"]
    z = rescaling.log_scales[:6]
    assert f"{float(z.exp().max()):.4g}" in rows[2]
    assert f"{float(z.std(correction=0)):.3f}" in rows[2]


class SumOfSquares:
    """A criterion of one's own that says neither what its optimality is nor how many parameters count."""

    def problem(self, traced, bound, device):
        masses = MassAggregator(traced.graph.num_groups, device)
        for name, parameter in traced.values.items():
            masses.add(parameter.square(), traced.graph.ends[name].dst, traced.graph.ends[name].src)
        nothing = torch.zeros(traced.graph.num_groups)
        return Problem(masses.matrix(), SumOuter(), kappa=2.0, linear=nothing, scale=5.0, bound=bound)


def sides(net):
    """Of each hidden neuron, the absolute values that enter it and those that leave it."""
    weight, bias, head = (parameter.detach().double().abs() for parameter in list(net.parameters())[:3])
    return torch.cat([weight, bias[:, None]], 1), head.T


def share_of_powers(net, p):
    into, out_of = (side.pow(p).sum(1) for side in sides(net))
    return (into - out_of).abs().max() / sum(q.detach().double().abs().pow(p).sum() for q in net.parameters())


def gradient_of_path_conditioning(net):
    gram = list(dagpath.gram_diagonal(dagpath.trace(net, torch.zeros(1, 3))).values())
    p, into, out_of = sum(map(torch.numel, gram)), gram[0].sum(1) + gram[1], gram[2].sum(0)
    return (-2 * p * (into - out_of) / sum(map(torch.sum, gram)) + 2 * (4 - 2)).abs().max() / p


def gradient_of_squares(net):
    into, out_of = (side.square().sum(1) for side in sides(net))
    return 2 * (into - out_of).abs().max() / 5


def difference_of_logarithms(net):
    into, out_of = (side.amax(1).log() for side in sides(net))
    return (into - out_of).abs().max()


@pytest.mark.parametrize(
    ("criterion", "measure", "expected"),
    [
        ("pathcond", "largest |∇F| / p", gradient_of_path_conditioning),
        (dagpath.EquiNorm(3), "largest |in − out| / sum", lambda net: share_of_powers(net, 3)),
        ("range", "largest |log max in − log max out|", difference_of_logarithms),
        (SumOfSquares(), "largest |∇F| / scale", gradient_of_squares),
    ],
)
def test_the_optimality_is_what_the_summary_and_the_warning_call_it(criterion, measure, expected):
    torch.manual_seed(0)
    net = mlp(3, 4, 2)
    traced = dagpath.trace(net, torch.zeros(1, 3))
    with pytest.warns(UserWarning, match="0 iterations") as warned:
        start = dagpath.balance(traced, criterion, max_iter=0)
    assert measure in str(warned[0].message)
    assert f"optimality ({measure})" in start.summary()
    assert start.optimality == pytest.approx(float(expected(net)), rel=1e-6)
    assert "p of" not in start.summary()
    minimum = dagpath.balance(traced, criterion, tol=1e-7, power_of_two=True)
    assert f"optimality before rounding ({measure})" in minimum.summary()
    assert minimum.optimality <= 1e-7


@pytest.mark.parametrize("criterion", ["equinorm", "range"])
def test_live_parameters_of_norms_and_ranges_are_those_that_are_not_zero(criterion):
    net = mlp(3, 4, 2)
    nn.init.zeros_(net[0].bias)
    rescaling = dagpath.balance(dagpath.trace(net, torch.zeros(1, 3)), criterion)
    assert rescaling.live == 12 + 8 + 2
    assert "22 of 26" in rescaling.summary()


@pytest.mark.parametrize("criterion", ["pathcond", "equinorm", "range"])
def test_the_summary_says_that_nothing_is_live(criterion):
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    rescaling = dagpath.balance(dagpath.trace(net, torch.zeros(1, 3)), criterion)
    assert rescaling.converged
    assert rescaling.log_scales.tolist() == [0] * 4
    assert "nothing to balance" in rescaling.summary()
