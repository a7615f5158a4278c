"""A rescaling by itself: composed, saved and loaded, and summed up."""

import pytest
import torch

import dagpath

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


def test_the_summary_by_layers_has_a_row_for_each_layer_with_free_neurons():
    torch.manual_seed(0)
    rescaling = dagpath.balance(dagpath.trace(mlp(4, 6, 5, 2), torch.zeros(1, 4)))
    rows = rescaling.summary(layers=True).split("\n\n")[1].splitlines()
    assert [row.split()[0] for row in rows[2:]] == ["0", "2"]
    z = rescaling.log_scales[:6]
    assert f"{float(z.exp().max()):.4g}" in rows[2]
    assert f"{float(z.std(correction=0)):.3f}" in rows[2]
