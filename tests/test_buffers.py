"""Buffers: what is asked of the trace of a file is answered from the file, and tables that differ are refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dagpath

from networks import Net, mlp

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def on_meta(model):
    return copy.deepcopy(model).to("meta")


def permuted(order):
    """Channels that are added to themselves in another order: who shares a factor depends on the table."""
    torch.manual_seed(0)
    net = Net(lambda m, x: m.b(F.relu(m.a(x)) + F.relu(m.c(x))[:, m.order]), a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    net.c = nn.Linear(4, 6)
    net.register_buffer("order", torch.tensor(order))
    return net


def selected(order):
    """The same through index_select, over two sources that are put side by side."""
    torch.manual_seed(0)
    net = Net(
        lambda m, x: m.b(torch.cat([F.relu(m.a(x)), F.relu(m.c(x))], 1).index_select(1, m.order) + F.relu(m.d(x))),
        **{name: nn.Linear(4, 6) for name in "acd"},
        b=nn.Linear(6, 2),
    )
    net.register_buffer("order", torch.tensor(order))
    return net


class Masked(nn.Module):
    """Only what a mask lets through is added: the mask weighs neurons, and ties all of them alike."""

    def __init__(self, mask):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(4, 6)
        self.register_buffer("mask", torch.tensor(mask))

    def forward(self, x):
        return self.b(torch.where(self.mask, F.relu(self.a(x)), F.relu(self.c(x))))


class Frozen(nn.Module):
    """A frozen batch norm made of buffers."""

    def __init__(self, offset):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("scale", torch.rand(6) + 0.5)
        self.register_buffer("offset", torch.full((6,), offset))

    def forward(self, x):
        return self.b(F.relu(self.a(x) * self.scale + self.offset))


def with_statistics(mean, variance):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        net[1].running_mean.fill_(mean)
        net[1].running_var.fill_(variance)
    return net.eval()


def in_and_out(net, tmp_path):
    save_file(net.state_dict(), tmp_path / "in.safetensors")
    return tmp_path / "in.safetensors", tmp_path / "out.safetensors"


ORDERS = [1, 2, 3, 4, 5, 0], [0, 1, 2, 4, 3, 5]
DIFFERENT = {
    "a permutation": (lambda: permuted(ORDERS[0]), lambda: permuted(ORDERS[1]), "order"),
    "a table of indices": (lambda: selected([0, 7, 2, 9, 4, 11]), lambda: selected([6, 1, 8, 3, 10, 5]), "order"),
}
ALIKE = {
    "a mask": (lambda: Masked([False, True] * 3), lambda: Masked([True] * 3 + [False] * 3)),
    "an offset": (lambda: Frozen(0.0), lambda: Frozen(1.0)),
    "statistics": (lambda: with_statistics(1.0, 4.0), lambda: with_statistics(-3.0, 0.1)),
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", DIFFERENT)
def test_a_buffer_that_says_which_neurons_meet_must_be_that_of_the_file(name, turned, tmp_path):
    ours, theirs, buffer = DIFFERENT[name]
    ours, theirs = (theirs, ours) if turned else (ours, theirs)
    paths = in_and_out(theirs(), tmp_path)
    with pytest.raises(ValueError, match=rf"the buffer '{buffer}' of .*in.safetensors has other .*at index \(\d,\)"):
        dagpath.rescale_checkpoint(ours(), X, *paths)
    assert {path.name for path in tmp_path.iterdir()} == {"in.safetensors"}


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", [*DIFFERENT, *ALIKE])
def test_a_model_without_values_has_the_neurons_that_the_file_says(name, which, tmp_path):
    net = (DIFFERENT | ALIKE)[name][which]().double()
    paths = in_and_out(net, tmp_path)
    found = dagpath.rescale_checkpoint(on_meta(net), X.double(), *paths)
    before = net(X.double())
    expected = dagpath.rescale_(net, X.double())
    assert found.traced.graph.digest() == expected.traced.graph.digest()
    assert torch.equal(found.log_scales, expected.log_scales)
    rescaled = load_file(paths[1])
    assert all(torch.equal(rescaled[key], value) for key, value in net.state_dict().items())
    torch.testing.assert_close(net(X.double()), before)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", DIFFERENT)
def test_a_rescaling_is_not_applied_to_a_model_in_which_other_neurons_meet(name, turned):
    ours, theirs, buffer = DIFFERENT[name]
    ours, theirs = (theirs(), ours()) if turned else (ours(), theirs())
    rescaling = dagpath.random_rescaling(dagpath.trace(ours, X), sigma=1.0)
    before = copy.deepcopy(theirs.state_dict())
    with pytest.raises(ValueError, match=f"the buffer '{buffer}' of this model has other .* nothing was changed"):
        rescaling.apply_(theirs)
    assert all(torch.equal(before[key], value) for key, value in theirs.state_dict().items())
    again = copy.deepcopy(ours)
    outputs = again(X)
    rescaling.apply_(again)
    torch.testing.assert_close(again(X), outputs)


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", DIFFERENT)
def test_a_table_that_changed_since_the_trace_is_noticed(name, turned, replaced):
    ours, theirs, buffer = DIFFERENT[name]
    net, other = (theirs(), ours()) if turned else (ours(), theirs())
    rescaling = dagpath.random_rescaling(dagpath.trace(net, X), sigma=1.0)
    if replaced:
        setattr(net, buffer, getattr(other, buffer))
    else:
        getattr(net, buffer).copy_(getattr(other, buffer))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=f"the buffer '{buffer}' of the model has other values .*nothing was changed"):
        rescaling.apply_()
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


@pytest.mark.parametrize("name", ALIKE)
def test_what_only_weighs_may_change_between_two_rescalings(name):
    net, other = (make() for make in ALIKE[name])
    traced = dagpath.trace(net, X)
    for values in (other.state_dict(), net.state_dict()):
        net.load_state_dict({**net.state_dict(), **{key: values[key].clone() for key, _ in net.named_buffers()}})
        before = net(X)
        dagpath.random_rescaling(traced, sigma=1.0).apply_()
        torch.testing.assert_close(net(X), before)


def test_a_model_that_lacks_a_buffer_or_has_it_in_another_shape_is_another():
    net = permuted(ORDERS[0])
    rescaling = dagpath.random_rescaling(dagpath.trace(net, X))
    other = copy.deepcopy(net)
    other.order = other.order[None]
    with pytest.raises(ValueError, match=r"the buffer 'order' of this model has shape \(1, 6\), not \(6,\)"):
        rescaling.apply_(other)
    del other.order
    with pytest.raises(ValueError, match="it has no buffer 'order'"):
        rescaling.apply_(other)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", ALIKE)
def test_a_buffer_that_only_weighs_may_differ_since_factors_are_exact_for_any(name, turned, tmp_path):
    ours, theirs = (make().double() for make in (reversed(ALIKE[name]) if turned else ALIKE[name]))
    x = X.double()
    paths = in_and_out(theirs, tmp_path)
    found = dagpath.rescale_checkpoint(ours, x, *paths)
    expected = dagpath.balance(dagpath.trace(theirs, x))
    assert torch.equal(found.log_scales, expected.log_scales)
    before = theirs(x)
    theirs.load_state_dict(load_file(paths[1]))
    torch.testing.assert_close(theirs(x), before)
    before = ours(x)
    found.apply_(ours)
    torch.testing.assert_close(ours(x), before)


def test_statistics_may_differ_and_the_file_decides_what_they_weigh(tmp_path):
    theirs, ours = with_statistics(1.0, 4.0).double(), with_statistics(-3.0, 0.1).double()
    paths = in_and_out(theirs, tmp_path)
    expected = dagpath.balance(dagpath.trace(theirs, X.double()))
    for model in (ours, on_meta(ours)):
        found = dagpath.rescale_checkpoint(model, X.double(), *paths)
        assert torch.equal(found.log_scales, expected.log_scales)
    assert not torch.equal(dagpath.balance(dagpath.trace(ours, X.double())).log_scales, expected.log_scales)
    before = ours(X.double())
    expected.apply_(ours)  # exact for any statistics
    torch.testing.assert_close(ours(X.double()), before)


def test_a_buffer_that_is_stored_is_in_the_file_and_one_that_is_computed_need_not_be(tmp_path):
    net = permuted(ORDERS[0])
    tensors = net.state_dict()
    order = tensors.pop("order")
    save_file(tensors, tmp_path / "in.safetensors")
    paths = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    with pytest.raises(
        ValueError, match=r"has no 'order', a buffer that the model reads and stores: .* persistent=False"
    ):
        dagpath.rescale_checkpoint(net, X, *paths)
    net.register_buffer("order", order, persistent=False)
    found = dagpath.rescale_checkpoint(net, X, *paths)
    assert torch.equal(found.log_scales, dagpath.balance(dagpath.trace(net, X)).log_scales)


def test_a_buffer_that_nothing_reads_is_not_asked_for(tmp_path):
    net = mlp(4, 6, 2)
    net.register_buffer("unused", torch.ones(3))
    tensors = net.state_dict()
    del tensors["unused"]
    save_file(tensors, tmp_path / "in.safetensors")
    assert dagpath.rescale_checkpoint(net, X, tmp_path / "in.safetensors", tmp_path / "out.safetensors").converged


MODELS = {
    "a perceptron": lambda: mlp(4, 6, 5, 2),
    "a batch norm": lambda: with_statistics(0.5, 2.0),
    "a frozen batch norm": lambda: Frozen(0.3),
    "a table": lambda: permuted(ORDERS[0]),
}
QUESTIONS = {
    "path_norm": lambda traced: dagpath.path_norm(traced),
    "path_count": lambda traced: dagpath.path_count(traced),
    "adjacency": lambda traced: traced.graph.adjacency("l1").to_dense(),
    "networkx": lambda traced: sorted(
        (a, b, tuple(sorted(data.items()))) for a, b, data in traced.graph.to_networkx("neuron").edges(data=True)
    ),
    "top_paths": lambda traced: [(path.neurons, path.value, path.share) for path in dagpath.top_paths(traced, 3)],
    "unroll": lambda traced: traced.unroll().path_count(),
    "paths": lambda traced: dagpath.PathLifting(traced).values,
    "path_mass": lambda traced: dagpath.path_mass(traced),
    "gram": lambda traced: torch.cat([part.reshape(-1) for part in dagpath.gram_diagonal(traced).values()]),
    "lengths": lambda traced: dagpath.path_length_profile(traced, p=2),
    "conserved": lambda traced: dagpath.conserved_quantities(traced),
    "buffers": lambda traced: {name: value.tolist() for name, value in traced.buffers.items()},
    "balance": lambda traced: dagpath.balance(traced, "equinorm").log_scales,
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_asked_of_the_trace_of_a_file_is_answered_from_the_file(name, question, tmp_path):
    net = MODELS[name]().double()
    other = copy.deepcopy(net)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.0)
    paths = in_and_out(net, tmp_path)
    expected = QUESTIONS[question](dagpath.trace(net, X.double()))
    for model in (other, on_meta(net)):
        answer = QUESTIONS[question](dagpath.rescale_checkpoint(model, X.double(), *paths).traced)
        if isinstance(expected, torch.Tensor):
            torch.testing.assert_close(answer, expected)
        else:
            assert answer == expected


class GraphConvolution(nn.Module):
    def __init__(self, layout, product):
        super().__init__()
        torch.manual_seed(0)
        self.product = product
        self.first, self.second, self.head = nn.Linear(6, 7), nn.Linear(7, 8), nn.Linear(8, 5)
        self.double()
        adjacency = 0.5 * torch.eye(3) + torch.eye(3).roll(1, 0)
        self.register_buffer("adjacency", layout(adjacency.double()))

    def forward(self, x):
        return self.head(F.relu(self.product(self.adjacency, self.second(F.relu(self.first(x))))))


QUANTITIES = {
    "path_norm": dagpath.path_norm,
    "path_count": lambda traced: float(dagpath.path_count(traced)),
    "gram_diagonal": lambda traced: sum(float(values.sum()) for values in dagpath.gram_diagonal(traced).values()),
    "unroll": lambda traced: traced.unroll().path_norm(2),
    "gram": lambda traced: float((dagpath.gram(traced) @ torch.ones(158, dtype=torch.float64)).sum()),
    "top_paths": lambda traced: sum(path.value for path in dagpath.top_paths(traced, 5)),
    "realize": lambda traced: float(dagpath.PathLifting(traced).realize(NODES).sum()),
    "rescale": lambda traced: float(dagpath.rescale_(traced.model, NODES).log_scales.sum()),
}
NODES = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
@pytest.mark.parametrize("layout", [Tensor.to_sparse, Tensor.to_sparse_csr])
@pytest.mark.parametrize("product", [torch.matmul, torch.sparse.mm])
def test_a_sparse_buffer_is_treated_as_the_dense_one(layout, product):
    dense = dagpath.trace(GraphConvolution(Tensor.contiguous, torch.matmul), NODES)
    traced = dagpath.trace(GraphConvolution(layout, product), NODES)
    assert traced.graph.num_groups == dense.graph.num_groups == 15
    for name, quantity in QUANTITIES.items():
        assert quantity(traced) == pytest.approx(quantity(dense), rel=1e-9), name


def test_another_sparse_buffer_is_noticed():
    traced = dagpath.trace(GraphConvolution(Tensor.to_sparse, torch.sparse.mm), NODES)
    rescaling = dagpath.random_rescaling(traced)
    other = GraphConvolution(Tensor.to_sparse, torch.sparse.mm)
    rescaling.apply_(other)
    other.adjacency = torch.eye(3, dtype=torch.float64).to_sparse()
    rescaling.apply_(other)  # other weights of the same kind, with which the same neurons meet
    other.adjacency = torch.zeros(4, 3, dtype=torch.float64).to_sparse()
    with pytest.raises(ValueError, match=r"'adjacency' of .* has shape \(4, 3\), not \(3, 3\)"):
        rescaling.apply_(other)
