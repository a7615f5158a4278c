"""What cannot be traced, copied or summed over paths is refused with its cause and with advice that fits."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dagpath

from networks import Net, mlp


def make(function):
    torch.manual_seed(0)
    return Net(function, a=nn.Linear(4, 6), head=nn.Linear(6, 3), rnn=nn.GRU(4, 6, batch_first=True)).double().eval()


X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def a_number_of_a_weight(m, x):
    largest = float(m.a.weight.abs().max())
    return m.head(F.relu(m.a(x)) / largest)


def a_number_in_a_slice(m, x):
    count = int((x > 0).sum())
    return m.head(F.relu(m.a(x)))[:count]


def a_number_that_is_printed(m, x):
    h = F.relu(m.a(x))
    print(f"{h.mean().item():.3f}")
    return m.head(h)


def a_loop_until_it_is_small(m, x):
    h = F.relu(m.a(x))
    while h.norm() > 1:
        h = h / 2
    return m.head(h)


def a_gradient_inside(m, x):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(m.head(F.relu(m.a(x))).sum(), x)
    return gradient


def a_backward_pass_inside(m, x):
    with torch.enable_grad():
        h = F.relu(m.a(x))
        h.sum().backward()
    return m.head(h)


def a_packed_sequence(m, x):
    packed = nn.utils.rnn.pack_padded_sequence(x[:, None].expand(-1, 5, 4), torch.full((len(x),), 5), batch_first=True)
    h, _ = m.rnn(packed)
    return m.head(nn.utils.rnn.pad_packed_sequence(h, batch_first=True)[0])


def numpy_inside(m, x):
    return m.head(torch.from_numpy(np.maximum(m.a(x).detach().numpy(), 0.0)))


@pytest.mark.parametrize(
    ("function", "line", "advice"),
    [
        (a_number_of_a_weight, "float(m.a.weight", "leave it a tensor"),
        (a_number_in_a_slice, "int((x > 0)", "leave it a tensor"),
        (a_number_that_is_printed, "print(f", "leave it a tensor"),
        (a_loop_until_it_is_small, "while h.norm() > 1", "torch.where or torch.cond"),
        (a_gradient_inside, "", "torch.autograd.grad"),
        (a_backward_pass_inside, "", "torch.autograd.grad"),
        (a_packed_sequence, "m.rnn(packed)", "on the padded sequence"),
        (numpy_inside, ".numpy()", "use functions of PyTorch"),
    ],
)
def test_advice_fits_what_stops_a_trace(function, line, advice):
    with pytest.raises(dagpath.CaptureError) as caught:
        dagpath.trace(make(function), X)
    assert line in str(caught.value)
    assert advice in str(caught.value)


def test_inputs_that_no_graph_can_have_are_refused_by_name():
    net = make(lambda m, x: m.head(F.relu(m.a(x))))
    parts = [torch.randn(2, 4).double(), torch.randn(3, 4).double()]
    with pytest.raises(dagpath.CaptureError, match="an input is a nested tensor"):
        dagpath.trace(net, torch.nested.nested_tensor(parts, layout=torch.jagged))
    with pytest.raises(dagpath.CaptureError, match="an input is a PackedSequence"):
        dagpath.trace(net, (nn.utils.rnn.pack_sequence(parts, enforce_sorted=False),))
    net.parts = torch.nested.nested_tensor(parts, layout=torch.jagged)
    assert dagpath.trace(net, X).graph.num_groups == 6


@pytest.mark.parametrize("kind", [torch.distributions.Normal, torch.distributions.Laplace, torch.distributions.Gumbel])
def test_distributions_that_check_their_arguments_are_captured(kind, monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)  # torch.compile turns the checks off

    def forward(m, x):
        return kind(m.head(F.relu(m.a(x))), 1.0).log_prob(torch.zeros_like(x[:, :3]))

    assert dagpath.trace(make(forward), X).graph.num_groups == 6
    assert torch.distributions.Distribution._validate_args is True
    with pytest.raises(ValueError, match="Expected parameter scale"):
        kind(torch.zeros(2), -1.0)


def test_a_trace_inside_of_a_transform_is_refused():
    net = make(lambda m, x: m.head(F.relu(m.a(x))))
    with pytest.raises(dagpath.CaptureError, match="outside of vmap"):
        torch.vmap(lambda x: dagpath.path_norm(dagpath.trace(net, x[None])))(X)


@pytest.mark.parametrize("part", ["traced", "graph", "rescaling"])
@pytest.mark.parametrize("action", [copy.deepcopy, pickle.dumps])
def test_what_was_traced_is_neither_copied_nor_pickled(part, action):
    traced = dagpath.trace(mlp(4, 6, 3).double(), X)
    parts = {"traced": traced, "graph": traced.graph, "rescaling": dagpath.random_rescaling(traced)}
    with pytest.raises(TypeError, match="trace the copy of the model"):
        action(parts[part])


@pytest.mark.parametrize("generator", [None, 0])
def test_outputs_that_draw_random_numbers_are_no_sum_over_paths(generator):
    def forward(m, x):
        drawn = torch.rand(3, generator=generator if generator is None else torch.Generator().manual_seed(generator))
        return m.head(F.relu(m.a(x))) + drawn

    lifting = dagpath.PathLifting(dagpath.trace(make(forward), X))
    with pytest.raises(dagpath.UnsupportedOpError, match=r"rand at .* draws random numbers"):
        lifting.realize(X)


def test_a_sum_over_examples_is_realized_for_one():
    net = make(lambda m, x: m.head(F.relu(m.a(x))).sum())
    lifting = dagpath.PathLifting(dagpath.trace(net, X))
    with pytest.raises(ValueError, match=r"expected \[1, 4\]; one example, since outputs have no row for each"):
        lifting.realize(X)
    torch.testing.assert_close(lifting.realize(X[:1]), net(X[:1]))


def test_a_layer_that_a_call_makes_is_named_as_it_is_written():
    def forward(m, x):
        m.made = nn.Linear(6, 6, dtype=x.dtype)
        return m.head(m.made(F.relu(m.a(x))))

    assert "a call changes self.made, which later calls may read" in dagpath.trace(make(forward), X).explain()
