"""One call is not the model: a rescaling is exact in the calls that the trace did not get, or the neurons are fixed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dagpath

from networks import Net


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make(function: Callable[..., Any], **parts: Any) -> nn.Module:
    torch.manual_seed(0)
    layers = {"a": nn.Linear(5, 6), "b": nn.Linear(5, 6), "u": nn.Linear(6, 6), "head": nn.Linear(6, 2)}
    net = Net(function, **{**layers, **{name: part for name, part in parts.items() if isinstance(part, nn.Module)}})
    for name, part in parts.items():
        if not isinstance(part, nn.Module):
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                net.register_buffer(name, part)
            else:
                setattr(net, name, part)
    return net.double().eval()


def check(
    net: nn.Module, *inputs: Any, others: Sequence[tuple[Any, ...]] = (), free: int | None = None, calls: int = 1
) -> dagpath.TracedModel:
    """A rescaling by powers of two changes no bit of any call, one after the other, of a fresh copy of the model."""
    tries = [inputs, *others]

    def outputs() -> list[Tensor]:
        found = []
        for given in tries:
            model = copy.deepcopy(net)
            with torch.no_grad():
                found += [model(*copy.deepcopy(given)) for _ in range(calls)]
        return found

    before = outputs()
    traced = dagpath.trace(net, inputs)
    generator = torch.Generator().manual_seed(0)
    dagpath.random_rescaling(traced, sigma=3.0, power_of_two=True, generator=generator).apply_()
    for number, (one, other) in enumerate(zip(before, outputs(), strict=True)):
        assert torch.equal(one, other), f"call {number} changed\n{traced.explain()}"
    if free is not None:
        assert traced.graph.num_groups == free, traced.explain()
    return traced


# -- state between calls ----------------------------------------------------------------------------------------------


class Holder:
    """A plain object."""

    def __init__(self) -> None:
        self.value: Any = None


def recurrent(read: Callable[[Any], Any], write: Callable[[Any, Tensor], None]) -> Callable[..., Tensor]:
    def forward(m: Any, x: Tensor) -> Tensor:
        state = read(m)
        h = F.relu(m.a(x) + (0 if state is None else m.u(state)))
        write(m, h)
        return m.head(h)

    return forward


def assign(m: Any, h: Tensor) -> None:
    m.h = h


def assign_data(m: Any, h: Tensor) -> None:
    m.state.data = h


_STATES: dict[str, Any] = {
    "an attribute": (recurrent(lambda m: m.h, assign), {"h": None}),
    "a list": (recurrent(lambda m: m.kept[-1] if m.kept else None, lambda m, h: m.kept.append(h)), {"kept": []}),
    "a dictionary": (recurrent(lambda m: m.kept.get("h"), lambda m, h: m.kept.update(h=h)), {"kept": {}}),
    "nested containers": (
        recurrent(lambda m: m.kept["a"][0], lambda m, h: m.kept["a"].__setitem__(0, h)),
        {"kept": {"a": [None]}},
    ),
    "a plain object": (
        recurrent(lambda m: m.holder.value, lambda m, h: setattr(m.holder, "value", h)),
        {"holder": Holder()},
    ),
    "a buffer written in place": (
        recurrent(lambda m: m.state, lambda m, h: m.state.copy_(h)),
        {"state": torch.zeros(4, 6)},
    ),
    "a part of a buffer": (
        recurrent(lambda m: m.state, lambda m, h: m.state[:2].copy_(h[:2])),
        {"state": torch.zeros(4, 6)},
    ),
    "a buffer replaced": (
        recurrent(lambda m: m.state, lambda m, h: setattr(m, "state", h)),
        {"state": torch.zeros(4, 6)},
    ),
    "the data of a buffer": (recurrent(lambda m: m.state, assign_data), {"state": torch.zeros(4, 6)}),
    "what was computed once": (
        recurrent(lambda m: None, lambda m, h: None),
        {},
    ),
}


@pytest.mark.parametrize("name", _STATES)
def test_what_a_call_leaves_behind_keeps_its_scale(name: str) -> None:
    function, parts = _STATES[name]
    check(make(function, **copy.deepcopy(parts)), numbers(4, 5), calls=4)


def test_a_plain_tensor_written_in_place_is_state() -> None:
    net = make(recurrent(lambda m: m.holder.value, lambda m, h: m.holder.value.copy_(h)), holder=Holder())
    net.holder.value = torch.zeros(4, 6, dtype=torch.float64)
    check(net, numbers(4, 5), calls=4)


def test_a_cached_weight_is_a_constant_of_later_calls() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        if "w" not in m.kept:
            m.kept["w"] = m.u.weight.t().contiguous()
        return m.head(F.relu(F.relu(m.a(x)) @ m.kept["w"]))

    net = make(forward, kept={})
    x = numbers(4, 5)
    before = net(x)
    traced = dagpath.trace(net, x)  # the cache is there already, and is that of the weights as they were
    dagpath.random_rescaling(traced, sigma=3.0, power_of_two=True).apply_()
    assert torch.equal(net(x), before)


def test_a_number_that_a_call_changes_decides_the_next() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.count += 1
        return m.head(F.relu(m.a(x)).roll(m.count, 1))

    check(make(forward, count=0), numbers(4, 5), calls=3)


def counted(first: bool, then: bool, number: int) -> Callable[..., Tensor]:
    """After so many calls in the first mode, the units are others in the second."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.a(x))
        if m.training == then and m.count >= number:
            h = F.relu(m.u(torch.tanh(h) if number % 2 else h.flip(1) + h))
        m.count += m.training == first
        return m.head(h)

    return forward


@pytest.mark.parametrize(
    ("first", "then", "number"),
    [(mode, mode, number) for mode in (False, True) for number in (1, 2, 5)] + [(False, True, 1), (True, False, 1)],
)
def test_calls_in_a_row_are_looked_at_in_both_modes(first: bool, then: bool, number: int) -> None:
    net, x = make(counted(first, then, number), count=0), numbers(4, 5)

    def outputs() -> list[Tensor]:
        model, found = copy.deepcopy(net), []
        for training in [first] * number + [then] * 2:
            found.append(model.train(training)(x))
        return found

    before = outputs()
    traced = dagpath.trace(net, x)
    assert "a call changes self.count" in traced.explain()
    generator = torch.Generator().manual_seed(0)
    dagpath.random_rescaling(traced, sigma=3.0, power_of_two=True, generator=generator).apply_()
    assert all(map(torch.equal, outputs(), before))
    assert net.count == 0


def test_a_permutation_that_moves_is_no_constant() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.a(x)).index_select(1, m.order)
        m.order = m.order.roll(1)
        return m.head(y)

    check(make(forward, order=torch.tensor([2, 0, 1, 5, 4, 3])), numbers(4, 5), calls=4)


def test_what_a_call_writes_into_the_callers_containers_keeps_its_scale() -> None:
    def forward(m: Any, given: dict[str, Tensor]) -> Tensor:
        given["h"] = F.relu(m.a(given["x"]))
        return m.head(given["h"])

    net, first, second = make(forward), {"x": numbers(3, 5)}, {"x": numbers(3, 5)}
    net(first)
    dagpath.random_rescaling(dagpath.trace(net, ({"x": numbers(3, 5)},)), sigma=3.0, power_of_two=True).apply_()
    net(second)
    assert torch.equal(first["h"], second["h"])


def test_modules_that_change_places_are_followed() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.b, m.a = m.a, m.b
        return m.head(F.relu(m.u(F.relu(m.b(x)))))

    check(make(forward), numbers(3, 5), calls=4)


def test_a_model_that_looks_whether_it_is_traced_is_refused() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.a(x))
        return m.head(h if torch.compiler.is_compiling() else h.flip(1))

    with pytest.raises(dagpath.CaptureError, match="computes something else than the model"):
        dagpath.trace(make(forward), numbers(3, 5))


@pytest.mark.parametrize(
    "applies",
    [
        lambda m, x: m.training and torch.compiler.is_compiling(),
        lambda m, x: m.training and type(x) is not Tensor,
        lambda m, x: len(x) == 13 and torch.compiler.is_compiling(),
        lambda m, x: x.shape[1] > 7 and type(x) is not Tensor,
    ],
)
def test_a_model_that_looks_whether_it_is_traced_in_some_calls_is_refused(applies: Callable[..., bool]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.a(x[:, :5]))
        return m.head(h.flip(1) if applies(m, x) else h + m.b(x[:, :5]) * (1 if m.training or len(x) == 13 else 2))

    with pytest.raises(dagpath.CaptureError, match="computes something else than the model"):
        dagpath.trace(make(forward), numbers(3, 5))


def test_a_call_without_gradients_is_looked_at() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.a(x))
        return m.head(h if torch.is_grad_enabled() else h.flip(1))

    check(make(forward), numbers(3, 5))


@pytest.mark.parametrize("asks", [torch.is_grad_enabled, torch.is_inference_mode_enabled])
def test_the_modes_of_gradients_are_looked_at(asks: Callable[[], bool]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.a(x))
        if not torch.is_grad_enabled() and torch.is_inference_mode_enabled() == asks():
            h = F.relu(m.u(h.flip(1) + h))
        return m.head(h if asks() else h + m.b(x))

    net, x = make(forward), numbers(3, 5)
    modes = (torch.enable_grad, torch.no_grad, torch.inference_mode)

    def outputs() -> list[Tensor]:
        found = []
        for mode in modes:
            with mode():
                found.append(net(x))
        return found

    before = outputs()
    generator = torch.Generator().manual_seed(0)
    dagpath.random_rescaling(dagpath.trace(net, x), sigma=3.0, power_of_two=True, generator=generator).apply_()
    assert all(map(torch.equal, outputs(), before))


def lent_type(m: Any, x: Tensor) -> Tensor:
    """Units in an order that depends on the length; the input lends its type alone."""
    shift = torch.ones(x.shape[1]).sum().to(x).long()
    return m.head(F.relu(m.a(x))[..., (torch.arange(6) + shift) % 6])


def written_through_a_view(m: Any, x: Tensor) -> Tensor:
    shift = torch.zeros(1, dtype=torch.long)
    shift.view(-1).add_(torch.ones(x.shape[1], dtype=torch.long).sum())
    return m.head(F.relu(m.a(x))[..., (torch.arange(6) + shift) % 6])


def written_to_two(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.a(x)).detach()
    with torch.no_grad():
        values, indices = torch.max(h, 1, out=(h.new_empty(0), torch.empty(0, dtype=torch.long)))
    return m.head(values + indices)


def written_to_a_part(m: Any, x: Tensor) -> Tensor:
    h, kept = F.relu(m.a(x)).detach(), x.new_zeros(x.shape[0], x.shape[1], 6)
    with torch.no_grad():
        torch.mul(h[:, :3], 2.0, out=kept[:, :3])
    return m.head(kept[:, -1])


def masked_by_position(m: Any, x: Tensor) -> Tensor:
    late = torch.arange(x.shape[1])[:, None] > 5
    return m.head(torch.where(late, F.relu(m.b(x)), F.relu(m.a(x))).mean(1))


def used_by_two_lengths(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.a(x))
    order = {15: [1, 0, 2, 3, 4, 5], 9: [0, 1, 3, 2, 4, 5]}.get(x.shape[1], [0, 1, 2, 3, 4, 5])
    return m.head(h) + (m.head(m.u(h[..., order])) if x.shape[1] > 7 else 0.0)


@pytest.mark.parametrize(
    "function",
    [lent_type, written_through_a_view, written_to_two, written_to_a_part, masked_by_position, used_by_two_lengths],
)
@pytest.mark.parametrize("length", [4, 7])
def test_what_the_length_decides_is_no_constant(function: Callable[..., Any], length: int) -> None:
    others = [(numbers(2, other, 5),) for other in (length - 1, length + 1, 2 * length + 1)]
    check(make(function), numbers(2, length, 5), others=others)


def test_a_dimension_that_is_even_and_one_that_is_odd_are_looked_at() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        left, right = F.pixel_shuffle(F.relu(m.conv(x)), 2).chunk(2, -1)
        return (left[..., 0] - 2 * right[..., 0]).mean(-1) @ m.out.weight.t()

    net = make(forward, conv=nn.Conv2d(3, 8, 3, padding=1), out=nn.Linear(2, 2))
    check(net, numbers(2, 3, 4, 4), others=[(numbers(2, 3, *size),) for size in ((4, 5), (5, 4), (9, 9), (3, 6))])


def test_a_model_with_attention_is_compared_with_its_graph() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.scaled_dot_product_attention(x, x, x)
        return m.head(F.relu(m.a(h)) + (0.0 if torch.compiler.is_compiling() else m.b(h).exp()))

    with pytest.raises(dagpath.CaptureError, match="something else than the model"):
        dagpath.trace(make(forward), numbers(2, 4, 5))


def test_inputs_that_the_model_refuses_are_refused() -> None:
    with pytest.raises(dagpath.CaptureError, match="same dtype"):
        dagpath.trace(make(lambda m, x: m.head(F.relu(m.a(x)))), numbers(2, 5).float())


@pytest.mark.parametrize("include_last", [False, True])
def test_indices_that_pytorch_does_not_check_are_not_made_up(include_last: bool) -> None:
    def forward(m: Any, indices: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
        return m.head(F.relu(m.bags(indices, starts, weights)))

    bags = nn.EmbeddingBag(10, 6, mode="sum", include_last_offset=include_last)
    given = torch.tensor([1, 3, 9, 0, 4, 4, 2]), torch.tensor([0, 3, 7]), numbers(7).abs()
    other = torch.tensor([5, 3, 9]), torch.tensor([0, 1, 3]), numbers(3, seed=2).abs()
    check(make(forward, bags=bags), *given, others=[other])


def test_operations_of_other_libraries_are_not_run_on_inputs_that_were_made_up(capsys: Any) -> None:
    @torch.library.custom_op("dagpath_tests::rows_unchecked", mutates_args=())
    def rows(x: Tensor, index: Tensor) -> Tensor:
        print("rows of", len(x))
        return x[index.clamp(max=len(x) - 1)]

    rows.register_fake(lambda x, index: x.new_empty((*index.shape, x.shape[-1])))
    net = make(lambda m, x, index: m.head(rows(F.relu(m.a(x)), index)))
    dagpath.trace(net, (numbers(4, 5), torch.tensor([0, 3, 3])))
    assert set(capsys.readouterr().out.splitlines()) == {"rows of 4"}


def test_a_call_that_cannot_be_captured_is_named() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.a(x))
        return m.head(-h if len(x) == 2 and h.sum() > 9 else h)

    with pytest.warns(UserWarning, match=r"could not be captured: a call with inputs of the sizes \[2, 5\]"):
        traced = dagpath.trace(make(forward), numbers(4, 5))
    call = "no call with inputs of the sizes [2, 5]"
    assert f"Holds for {call} and {call} in train mode, which could not be captured." in traced.explain()


def test_a_counter_that_nothing_reads_costs_nothing() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.count += 1
        m.calls.add_(1)
        return m.head(F.relu(m.a(x)))

    check(make(forward, count=0, calls=torch.zeros(())), numbers(4, 5), calls=2, free=6)


# -- other numbers of examples, other lengths -------------------------------------------------------------------------


def unrolled(m: Any, x: Tensor) -> Tensor:
    h = x.new_zeros(len(x), 6)
    for step in x.unbind(1):
        h = F.relu(m.a(step) + m.u(h))
    return m.head(h)


def mixed_by_size(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.a(x))
    return m.head(h.transpose(1, 2).reshape(h.shape)).mean(1)


_LENGTHS: dict[str, Any] = {
    "steps from zeros": (unrolled, {}, (4, 3, 5), 6),
    "one step from zeros": (unrolled, {}, (4, 1, 5), 6),
    "learned positions": (
        lambda m, x: m.head(F.relu(m.a(x) + m.p[:, : x.shape[1]])),
        {"p": nn.Parameter(torch.randn(1, 40, 6))},
        (4, 8, 5),
        6,
    ),
    "positions by number": (
        lambda m, x: m.head(F.relu(m.a(x) + m.p(torch.arange(x.shape[1])))),
        {"p": nn.Embedding(40, 6)},
        (4, 8, 5),
        6,
    ),
    "the last positions": (
        lambda m, x: m.head(F.relu(m.a(x) + m.p[-x.shape[1] :])),
        {"p": nn.Parameter(torch.randn(40, 6))},
        (4, 8, 5),
        6,
    ),
    "a gain by position": (
        lambda m, x: m.head(F.relu(m.a(x)) * m.p[: x.shape[1], None]),
        {"p": nn.Parameter(torch.randn(40))},
        (4, 8, 5),
        None,
    ),
    "units by the length": (
        lambda m, x: m.head(F.pad(F.relu(m.a(x))[..., : x.shape[1] // 2], (0, 6 - min(6, x.shape[1] // 2)))),
        {},
        (4, 4, 5),
        None,
    ),
    "units by the length, into a hidden layer": (
        lambda m, x: m.head(
            F.relu(m.u(F.pad(F.relu(m.a(x))[..., : x.shape[1] // 2], (0, 6 - min(6, x.shape[1] // 2)))) + m.b(x))
        ),
        {},
        (4, 4, 5),
        None,
    ),
    "channels mixed with positions": (mixed_by_size, {}, (4, 6, 5), None),
    "two offsets of one table": (
        lambda m, x: m.head(F.relu(m.a(x) + m.p[: x.shape[1]]) + F.relu(m.b(x) + m.p[x.shape[1] : 2 * x.shape[1]])),
        {"p": nn.Parameter(torch.randn(40, 6))},
        (4, 4, 5),
        None,
    ),
    "strides by the length": (
        lambda m, x: m.head(F.relu(m.a(x)).flatten(1)[:, :: x.shape[1]][:, :6]),
        {},
        (4, 3, 5),
        None,
    ),
    "rolled by the length": (
        lambda m, x: m.head(F.relu(m.a(x)).roll(x.shape[1], 2)),
        {},
        (4, 3, 5),
        None,
    ),
    "relative positions": (
        lambda m, x: m.head(
            F.relu(m.a(x) + m.p[torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1]) + 20].sum(1))
        ),
        {"p": nn.Parameter(torch.randn(41, 6))},
        (4, 4, 5),
        None,
    ),
}


@pytest.mark.parametrize("name", _LENGTHS)
def test_other_lengths_are_right(name: str) -> None:
    function, parts, shape, free = _LENGTHS[name]
    others = [(numbers(batch, length, 5, seed=length),) for batch, length in ((2, 1), (3, 2), (1, 5), (4, 7), (2, 11))]
    check(make(function, **copy.deepcopy(parts)), numbers(*shape), others=others, free=free)


_BATCHES: dict[str, Any] = {
    "rows of a table": (
        lambda m, x: m.head(F.relu(m.a(x) + m.p[: len(x)])),
        {"p": nn.Parameter(torch.randn(40, 6))},
        6,
    ),
    "interleaved rows": (lambda m, x: m.head(torch.stack([m.a(x), m.b(x)], 1).flatten(0, 1)[: len(x)]), {}, None),
    "every other row": (lambda m, x: m.head(torch.cat([m.a(x), m.b(x)])[::2]), {}, None),
    "the middle rows": (lambda m, x: m.head(torch.cat([m.a(x), m.b(x)])[len(x) // 2 : len(x) // 2 + len(x)]), {}, None),
    "units by the number of examples": (lambda m, x: m.head(F.relu(m.a(x)).roll(len(x), 1)), {}, None),
    "a constant row": (lambda m, x: m.head(F.relu(m.a(x))[[0]].expand(len(x), 6)), {}, 6),
    "rows turned over": (lambda m, x: m.head(F.relu(m.a(x)).flip(0) + F.relu(m.b(x))), {}, 6),
    "the sum of all rows": (lambda m, x: m.head(F.relu(m.a(x)) + F.relu(m.a(x)).sum(0)), {}, 6),
    "a running sum of rows": (lambda m, x: m.head(F.relu(m.a(x)).cumsum(0)), {}, 6),
    "rows added to rows": (
        lambda m, x: m.head(F.relu(m.a(x)).index_add(0, torch.zeros(len(x), dtype=torch.int64), F.relu(m.b(x)))),
        {},
        6,
    ),
    "rows by the largest entry": (lambda m, x: m.head(F.relu(m.a(x))[x.argmax(0)].mean(0)), {}, 6),
    "gathered rows": (
        lambda m, x: m.head(F.relu(m.a(x)).gather(0, x.argsort(0)[:, :1].expand(-1, 6))),
        {},
        6,
    ),
}


@pytest.mark.parametrize("name", _BATCHES)
def test_other_numbers_of_examples_are_right(name: str) -> None:
    function, parts, free = _BATCHES[name]
    others = [(numbers(batch, 5, seed=batch),) for batch in (1, 2, 3, 5, 7, 12)]
    check(make(function, **copy.deepcopy(parts)), numbers(4, 5), others=others, free=free)


@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_images_of_other_sizes_are_right(size: int) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.c(x))
        h = h.flatten(2).transpose(1, 2).reshape(h.shape)
        return m.d(h).mean((2, 3))

    net = make(forward, c=nn.Conv2d(3, 8, 1), d=nn.Conv2d(8, 2, 1))
    others = [(numbers(2, 3, height, width),) for height, width in ((2, 3), (3, 3), (4, 4), (5, 2), (8, 8))]
    check(net, numbers(2, 3, size, size), others=others)


def flipped_beyond_many_examples(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.a(x))
    return m.head(h.flip(-1) if len(x) > 64 else h)


def read_beyond_a_position(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.a(x))
    return m.head(h.sum(1) + h[:, 32:].flip(-1).sum(1))


def another_layer_beyond_a_length(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.a(x))
    if x.shape[1] >= 200:
        h = torch.cat([h[:, :1], m.u(h[:, 1:])], 1)
    return m.head(h)


def rolled_after_many_steps(m: Any, x: Tensor) -> Tensor:
    h = x.new_zeros(len(x), 6)
    for t in range(x.shape[1]):
        h = F.relu(m.a(x[:, t]) + m.u(h))
        if t > 40:
            h = h.roll(1, -1)
    return m.head(h)


def rolled_by_the_number_of_examples(m: Any, x: Tensor) -> Tensor:
    return m.head(F.relu(m.a(x)).roll(len(x) // 16, 1))


def rolled_by_the_length(m: Any, x: Tensor) -> Tensor:
    return m.head(F.relu(m.a(x)).roll(int(x.shape[1] / 16), 2))


def in_an_order_of_the_length(m: Any, x: Tensor) -> Tensor:
    return m.head(F.relu(m.a(x))[..., (torch.arange(6) + x.shape[1] // 20) % 6])


def rolled_in_short_sequences(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.a(x))
    return m.head(h.roll(1, -1) if x.shape[1] < 3 else h)


def branches_of_a_length(m: Any, x: Tensor) -> Tensor:
    h = torch.cond(x.sum() > 0, lambda x: F.relu(m.a(x)), lambda x: F.relu(m.a(x) + 1.0), (x,))
    return m.head(h.roll(x.shape[1] // 5, -1))


@pytest.mark.parametrize(
    ("function", "shape", "other"),
    [
        (rolled_in_short_sequences, (3, 10, 5), (3, 2, 5)),
        (branches_of_a_length, (3, 4, 5), (3, 9, 5)),
        (rolled_by_the_number_of_examples, (3, 5), (40, 5)),
        (rolled_by_the_length, (3, 4, 5), (2, 16, 5)),
        (in_an_order_of_the_length, (3, 4, 5), (2, 20, 5)),
        (flipped_beyond_many_examples, (3, 5), (300, 5)),
        (read_beyond_a_position, (3, 4, 5), (2, 150, 5)),
        (another_layer_beyond_a_length, (3, 4, 5), (2, 300, 5)),
        (rolled_after_many_steps, (3, 4, 5), (2, 60, 5)),
    ],
)
def test_a_size_from_which_on_the_model_takes_another_way_is_found(
    function: Callable[..., Any], shape: tuple[int, ...], other: tuple[int, ...]
) -> None:
    check(make(function), numbers(*shape), others=[(numbers(*other),)])


def rows_of_blocks(m: Any, x: Tensor) -> Tensor:
    return m.head(F.relu(m.a(x) + m.rows[torch.arange(x.shape[1]) // 16]))


def a_head_for_a_length(m: Any, x: Tensor) -> Tensor:
    return m.heads[x.shape[1] % 7](F.relu(m.a(x)))


def as_many_layers_as_positions(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.a(x)).mean(1)
    for layer in m.heads[: x.shape[1]]:
        h = F.relu(layer(h))
    return h


@pytest.mark.parametrize("function", [rows_of_blocks, a_head_for_a_length, as_many_layers_as_positions])
def test_sizes_for_which_nothing_is_known_are_not_claimed(function: Callable[..., Any]) -> None:
    parts = {"rows": nn.Parameter(torch.randn(8, 6)), "heads": nn.ModuleList(nn.Linear(6, 6) for _ in range(7))}
    traced = dagpath.trace(make(function, **parts), numbers(2, 4, 5))
    looked = "[n, 4, 5]; [n, 1, 5]; [n, 5, 5]; [n, 9, 5]"
    assert f"inputs of the sizes {looked} alone: calls of other sizes differ" in traced.captured.covers


def test_a_model_that_takes_one_example_is_not_said_to_take_any_number() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        if len(x) != 1:
            raise ValueError("one example at a time")
        return m.head(F.relu(m.a(x)))

    traced = dagpath.trace(make(forward), numbers(1, 5))
    assert traced.captured.covers[0] == "sizes of dimension 0 that were looked at (1)"


def test_a_roll_over_all_entries_is_not_one_along_a_dimension() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.a(x)).transpose(1, 2)
        return torch.roll(h, 1, None).flip(2)[..., 3] @ m.head.weight.t()

    others = [(numbers(2, length, 5),) for length in (5, 9)]
    check(make(forward), numbers(2, 4, 5), others=others)


def test_numbers_of_examples_for_which_nothing_is_known_are_not_claimed() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(F.relu(m.a(x)) + m.rows[torch.arange(len(x)) // 16])

    traced = dagpath.trace(make(forward, rows=nn.Parameter(torch.randn(8, 6))), numbers(4, 5))
    assert traced.captured.covers[0] == "sizes of dimension 0 that were looked at (1, 2, 4, 13)"


def test_a_loop_over_a_sequence_takes_one_way() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 6)
        for t in range(x.shape[1]):
            h = F.relu(m.a(x[:, t]) + m.u(h))
        return m.head(h)

    traced = check(make(forward), numbers(3, 4, 5), others=[(numbers(2, 70, 5),)], free=6)
    looked = "[n, 4, 5]; [n, 1, 5]; [n, 5, 5]; [n, 9, 5]"
    assert f"Holds for inputs of the sizes {looked} alone: calls of other sizes differ." in traced.explain()


def test_further_examples_are_looked_at() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(F.relu(m.a(x) if x.shape[1] < 20 else m.a(x) + m.b(x)).mean(1))

    net, x, long = make(forward), numbers(2, 8, 5), numbers(2, 30, 5)
    before = net(x), net(long)
    traced = dagpath.trace(net, x, more_examples=[long])
    dagpath.random_rescaling(traced, sigma=3.0, power_of_two=True).apply_()
    assert torch.equal(net(x), before[0])
    assert torch.equal(net(long), before[1])


def test_keyword_arguments_may_be_further_examples() -> None:
    class Switched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor, both: bool = False) -> Tensor:
            return self.head(F.relu(self.a(x) + self.b(x) if both else self.a(x)))

    net, x = Switched().double(), numbers(3, 5)
    before = net(x), net(x, both=True)
    traced = dagpath.trace(net, (), kwargs={"x": x}, more_examples=[{"x": x, "both": True}])
    dagpath.random_rescaling(traced, sigma=3.0, power_of_two=True).apply_()
    assert torch.equal(net(x), before[0])
    assert torch.equal(net(x, both=True), before[1])
    with pytest.raises(dagpath.CaptureError, match="forward raised"):
        dagpath.trace(net, x, more_examples=[numbers(3, 4)])


def test_the_trace_says_what_it_covers() -> None:
    flexible = dagpath.trace(make(lambda m, x: m.head(F.relu(m.a(x)).mean(1))), numbers(2, 3, 5))
    assert "Holds for inputs of other sizes too; looked at: [n, 1, 5]; [n, 4, 5]; [n, 7, 5]." in flexible.explain()
    fixed = dagpath.trace(make(lambda m, x: m.head(F.relu(m.a(x)))), numbers(2, 5))
    assert "any number n of examples" in fixed.explain()
    assert "inputs of the size [n, 5] alone" in fixed.explain()
    assert fixed.explain(format="dict")["covers"] == list(fixed.captured.covers)


def test_arguments_that_are_no_tensors_are_named() -> None:
    def forward(m: Any, x: Tensor, steps: int = 1, *, options: Any = None) -> Tensor:
        return m.head(sum((F.relu(m.a(x)) for _ in range(steps)), 0))

    given = numbers(4, 5), 3
    traced = dagpath.trace(make(forward), given, {"options": {"reduce": ["mean", None]}})
    assert "Holds for the arguments" in traced.explain()
    assert "args[1]=3, kwargs['options']['reduce'][0]='mean' as given" in traced.explain()


def test_weights_that_met_zeros_alone_are_left_as_they_are_and_reported() -> None:
    class OneStep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.u, self.head = nn.Linear(5, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.a(x.reshape(-1, 5)) + self.u(x.new_zeros(1, 6))))

    net = OneStep().double()
    before = net.u.weight.detach().clone()
    traced = check(net, numbers(2, 5), free=6)
    assert torch.equal(net.u.weight, before)
    assert traced.graph.unknown == ["u.weight"]
    assert "read zeros alone" in traced.explain()


# -- modes ------------------------------------------------------------------------------------------------------------


def outputs_in_train_mode(net: nn.Module, *inputs: Tensor) -> list[Tensor]:
    found = []
    for x in inputs:
        model = copy.deepcopy(net).train()
        torch.manual_seed(0)
        with torch.no_grad():
            found.append(model(x))
    return found


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.head(F.relu(m.a(x) + (m.p[: len(x)] if m.training else 0))),
        lambda m, x: m.head(
            torch.cat([m.a(x), m.b(x)])[: len(x)] if not m.training else torch.cat([m.b(x), m.a(x)])[1 : 1 + len(x)]
        ),
        lambda m, x: m.head(F.relu(m.a(x)).roll(len(x) if m.training else 0, 1)),
        lambda m, x: m.head(F.relu(m.a(x))) + (m.head(F.relu(m.b(x)))[: len(x)] if m.training else 0),
    ],
)
def test_train_mode_is_right_for_other_numbers_of_examples(function: Any) -> None:
    net = make(function, p=nn.Parameter(torch.randn(20, 6)))
    examples = [numbers(batch, 5) for batch in (8, 2, 3, 5, 13)]
    before = outputs_in_train_mode(net, *examples)
    dagpath.random_rescaling(dagpath.trace(net, examples[0]), sigma=3.0, power_of_two=True).apply_()
    for one, other in zip(before, outputs_in_train_mode(net, *examples), strict=True):
        assert torch.equal(one, other)


def test_modules_in_mixed_modes_are_right() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.a(x))
        return m.head(h + F.relu(m.b(x)) if m.first.training != m.second.training else h)

    net = make(forward, first=nn.Dropout(0.0), second=nn.Dropout(0.0))
    net.first.train()
    x = numbers(3, 5)
    before = net(x)
    traced = dagpath.trace(net, x)
    assert (net.first.training, net.second.training) == (True, False)
    dagpath.random_rescaling(traced, sigma=3.0, power_of_two=True).apply_()
    assert torch.equal(net(x), before)


def test_a_train_mode_that_cannot_be_captured_is_verified_where_it_runs() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        if m.training and not torch.isfinite(h).all():
            h = h.clamp(-1, 1)
        return m.head(F.relu(h))

    net, x = make(forward), numbers(4, 5)
    before = outputs_in_train_mode(net, x)[0]
    with pytest.warns(UserWarning, match="cannot be captured in train mode"):
        dagpath.rescale_(net, x)
    assert torch.allclose(outputs_in_train_mode(net, x)[0], before, rtol=1e-9)


def test_path_quantities_do_not_depend_on_the_size_of_the_example_batch() -> None:
    functions = [
        lambda m, x: m.head(F.relu(m.a(x)) * torch.ones(6, dtype=x.dtype)),
        lambda m, x: m.head(F.relu(m.a(x)) * torch.linspace(0.5, 1.5, 6, dtype=x.dtype)),
        lambda m, x: m.head(F.relu(m.a(x))[:, torch.tensor([1, 0, 2, 3, 5, 4])]),
        lambda m, x: m.head(F.relu(m.a(x)).masked_fill(torch.arange(6) > 3, 0.0)),
        lambda m, x: m.head(F.relu(m.a(x)) + m.holder.value),
    ]
    for function in functions:
        net = make(function, holder=Holder())
        net.holder.value = torch.ones(6, dtype=torch.float64)
        counts = {dagpath.path_count(dagpath.trace(net, numbers(batch, 5))) for batch in (1, 2, 4, 7)}
        assert len(counts) == 1


# -- kinds of calls that only some modes, or some shapes, tell apart ---------------------------------------------------


@pytest.mark.parametrize(
    ("applies", "shape"),
    [
        (lambda m, x: m.training and len(x) == 1, (1, 5, 5)),
        (lambda m, x: m.training and x.shape[1] == 1, (3, 1, 5)),
        (lambda m, x: m.training and x.shape[1] > 64, (2, 70, 5)),
        (lambda m, x: m.training and not torch.is_grad_enabled(), (3, 4, 5)),
        (lambda m, x: not torch.is_grad_enabled() and x.shape[1] > 64, (2, 65, 5)),
        (lambda m, x: torch.is_inference_mode_enabled() and x.shape[1] > 64, (2, 65, 5)),
    ],
)
def test_what_one_mode_does_at_other_sizes_is_looked_at(applies: Callable[..., bool], shape: tuple[int, ...]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.a(x))
        return m.head(F.relu(m.u(h)) if applies(m, x) else h)

    net, x = make(forward), numbers(*shape, seed=2)

    def outputs() -> list[Tensor]:
        found = []
        for training in (False, True):
            net.train(training)
            for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
                with context():
                    found.append(net(x).detach().clone())
        net.eval()
        return found

    before = outputs()
    dagpath.random_rescaling(dagpath.trace(net, numbers(2, 4, 5)), sigma=3.0, power_of_two=True).apply_()
    for one, other in zip(before, outputs(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("example", "other"), [((5, 5), (7, 5)), ((5, 5), (5, 7)), ((4, 4), (9, 4))])
def test_sizes_that_are_equal_in_the_example_are_looked_at_apart(
    example: tuple[int, int], other: tuple[int, int]
) -> None:
    def two_lengths(m: Any, q: Tensor, k: Tensor) -> Tensor:
        h, g = F.relu(m.a(q)), F.relu(m.b(k))
        return m.head(h + (g if q.shape[1] == k.shape[1] else F.relu(m.u(g)).mean(1, keepdim=True)))

    def portrait(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.a(x))
        h = F.relu(m.u(h)) if x.shape[1] > x.shape[2] else h
        h = F.relu(m.u(h.flip(-1))) if x.shape[1] < x.shape[2] - 2 else h
        return m.head(h)

    lengths = [tuple(numbers(2, length, 5, seed=3) for length in sizes) for sizes in (example, other)]
    check(make(two_lengths), *lengths[0], others=[lengths[1]])
    check(make(portrait), numbers(2, *example, 5), others=[(numbers(2, *other, 5),)])


def test_calls_of_two_lengths_that_are_alike_are_claimed() -> None:
    net = make(lambda m, q, k: m.head(F.relu(m.a(q))).mean(1) + m.head(F.relu(m.b(k))).mean(1))
    covers = dagpath.trace(net, (numbers(2, 5, 5), numbers(2, 5, 5))).explain("dict")["covers"]
    assert any(line.startswith("inputs of other sizes too") for line in covers), covers


def test_a_padding_mask_of_an_encoder_is_no_other_function() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 5)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.head(self.encoder(x, src_key_padding_mask=mask))

    mask = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()
    assert dagpath.trace(Encoder().eval(), (torch.randn(2, 5, 8), mask)).graph.num_groups >= 32


def test_outputs_that_are_sparse_are_compared() -> None:
    net = make(lambda m, x: (m.head(F.relu(m.a(x))), F.relu(m.b(x)).to_sparse()))
    assert dagpath.trace(net, numbers(3, 5)).graph.num_neurons == 14
