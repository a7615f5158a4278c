"""Where values decide how many entries there are, every branch is seen, and the trace says what it holds for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_other_calls import check, make, numbers
from torch import Tensor, nn

import dagpath

X, NONE, SOME = numbers(8, 5), torch.zeros(8, dtype=torch.bool), torch.tensor([0, 0, 1, 0, 1, 1, 0, 0]).bool()


def by_masks(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    return m.head(torch.cat([F.relu(m.a(x[~mask])), F.relu(m.b(x[mask]))])).mean(0)


def by_numbers(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    (rows,) = torch.where(mask)
    return m.head(F.relu(m.a(x)).index_add(0, rows, F.relu(m.b(x[rows]))))


def by_nonzero(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    rows = mask.nonzero().squeeze(1)
    return m.head(F.relu(m.a(x)).sum(0) + F.relu(m.b(x.index_select(0, rows))).sum(0))


def by_experts(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    y = x.new_zeros(len(x), 6)
    for number, expert in enumerate((m.a, m.b)):
        (rows,) = torch.where(mask.long() == number)
        y = y.index_add(0, rows, F.relu(expert(x[rows])))
    return m.head(F.relu(m.u(y)))


def by_writing(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    h = F.relu(m.a(x)).clone()
    h[mask] = F.relu(m.b(x[mask]))
    return m.head(h)


def by_selection(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    chosen = torch.masked_select(x, mask[:, None]).view(-1, 5)
    return m.head(torch.cat([F.relu(m.a(x)), F.relu(m.b(chosen))])).sum(0)


def by_a_choice_of_a_choice(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    proposals, positive = x[mask | ~mask], mask[mask | ~mask]
    return m.head(torch.cat([F.relu(m.a(proposals)), F.relu(m.b(proposals[positive]))])).sum(0)


FORWARDS = [by_masks, by_numbers, by_nonzero, by_experts, by_writing, by_selection, by_a_choice_of_a_choice]


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("example", [NONE, SOME])
def test_a_branch_that_the_values_of_the_example_do_not_take_is_seen(
    forward: Callable[..., Tensor], example: Tensor
) -> None:
    others = [(X, mask) for mask in (NONE, SOME, ~SOME, ~NONE)]
    traced = check(make(forward), X, example, others=others)
    assert not {"b.weight", "a.weight"} & set(traced.graph.unknown)


@pytest.mark.parametrize("forward", FORWARDS)
def test_the_number_of_entries_that_values_choose_is_said_to_be_that_of_the_example(
    forward: Callable[..., Tensor],
) -> None:
    covers = dagpath.trace(make(forward), (X, SOME)).explain("dict")["covers"]
    assert any("values that choose as many entries" in line and "networks.py" in line for line in covers), covers


def test_path_quantities_do_not_depend_on_which_branch_the_example_takes() -> None:
    net = make(by_experts)
    norms = {dagpath.path_norm(dagpath.trace(net, (X[:1].repeat(8, 1), mask))) for mask in (NONE, ~NONE)}
    assert len(norms) == 1 or max(norms) / min(norms) < 2


def test_a_realization_for_other_numbers_of_entries_is_refused() -> None:
    net = make(by_nonzero)
    lifting = dagpath.PathLifting(dagpath.trace(net, (X, SOME)))
    torch.testing.assert_close(lifting.realize((X, SOME)), net(X, SOME))
    with pytest.raises(dagpath.UnsupportedOpError, match="trace the model on inputs like these"):
        lifting.realize((X, ~SOME))


def test_an_example_without_entries_is_looked_at_with_one() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    traced, one = dagpath.trace(net, X[:0]), dagpath.trace(net, X[:1])
    assert traced.graph.num_groups == 4
    assert dagpath.path_norm(traced) == dagpath.path_norm(one)
    assert dagpath.path_count(traced) == dagpath.path_count(one) == 5 * 4 * 2 + 4 * 2 + 2


def test_offsets_beyond_made_up_indices_are_not_run() -> None:
    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bags = nn.EmbeddingBag(7, 4, include_last_offset=True, mode="sum")
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
            return self.head(F.relu(self.bags(x, offsets)))

    net, inputs = Bags().double().eval(), (torch.arange(7), torch.tensor([0, 2, 7]))
    before = net(*inputs)
    dagpath.rescale_(net, inputs, power_of_two=True)
    assert torch.equal(net(*inputs), before)
