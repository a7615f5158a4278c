"""Operations of random networks that depend on how many examples there are, on lengths, and on types of numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dag_base import Kind, Parameters


def _by_value(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1)


def _first_overwritten(x: Tensor) -> Tensor:
    y = x.clone()
    y[0] = y[-1] * 2
    return y


def _attended(x: Tensor) -> Tensor:
    flat = x.flatten(1)
    return ((flat @ flat.mT).softmax(1) @ flat).reshape_as(x)


def _running(x: Tensor) -> Tensor:
    state, states = torch.zeros_like(x[:1]), []
    for place in range(len(x)):
        state = F.relu(state + x[place : place + 1])
        states.append(state)
    return torch.cat(states)


def _alternating(x: Tensor) -> Tensor:
    signs = 1 - 2 * (torch.arange(len(x)) % 2)
    return x * signs.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)


EXAMPLES = {
    "flip": lambda x: x.flip(0),
    "roll": lambda x: x.roll(1, 0),
    "minus the first": lambda x: x - x[:1],
    "plus the first": lambda x: x + x[0],
    "the last for all": lambda x: x[-1:].expand_as(x),
    "reversed": lambda x: x[torch.arange(len(x) - 1, -1, -1)],
    "picked": lambda x: x.index_select(0, torch.arange(len(x)) // 2),
    "ordered by value": lambda x: x[_by_value(x).argsort()],
    "sorted": lambda x: x.sort(0).values,
    "the one of the largest value": lambda x: x.index_select(0, _by_value(x).argmax().reshape(1)).expand_as(x),
    "added to others": lambda x: torch.zeros_like(x).index_add(0, torch.arange(len(x)) // 2, x),
    "added by value": lambda x: torch.zeros_like(x).index_add(0, (_by_value(x) > 0).long() % len(x), x),
    "copied to others": lambda x: torch.zeros_like(x).index_copy(0, torch.arange(len(x)).roll(1), x),
    "mean": lambda x: x.mean(0, keepdim=True).expand_as(x),
    "minus the mean": lambda x: x - x.mean(0),
    "plus the sum": lambda x: x + x.sum(0, keepdim=True),
    "largest": lambda x: x.amax(0, keepdim=True).expand_as(x),
    "running sum": lambda x: x.cumsum(0),
    "running state": _running,
    "halves swapped": lambda x: torch.cat(x.chunk(2, 0)[::-1]),
    "first two swapped": lambda x: torch.cat([x[1:2], x[:1], x[2:]]),
    "unbound": lambda x: torch.stack(x.unbind(0)[::-1]),
    "alternating": _alternating,
    "first overwritten": _first_overwritten,
    "attended": _attended,
    "the first alone": lambda x: x.masked_fill((torch.arange(len(x)) > 0).reshape(-1, *[1] * (x.ndim - 1)), 0.0),
    "turned, flipped, turned back": lambda x: x.transpose(0, 1).flip(0).transpose(0, 1),
    "as channels": lambda x: x.reshape(1, -1, *x.shape[2:]).flip(1).reshape_as(x),
    "as positions": lambda x: x.transpose(0, -1).flip(-1).transpose(0, -1),
    "by their number": lambda x: x / len(x),
    "by the parity of their number": lambda x: x if len(x) % 2 else -x,
    "channels rolled by their number": lambda x: x.roll(len(x), 1),
    "squares": lambda x: x.flatten(1) @ x.flatten(1).mT,
}
"""Over dimension 0."""


def _half(x: Tensor) -> int:
    return max(1, x.shape[-1] // 2)


LENGTHS = {
    "first half": lambda x: x[..., : _half(x)],
    "last half": lambda x: x[..., -_half(x) :],
    "even length": lambda x: x[..., x.shape[-1] % 2 :],
    "padded to even": lambda x: F.pad(x, (0, x.shape[-1] % 2)),
    "padded to four": lambda x: F.pad(x, (0, 4 - x.shape[-1])),
    "two places": lambda x: x[..., :: _half(x)][..., :2],
    "windows of a half": lambda x: x.unfold(-1, _half(x), 1).mean(-1),
    "pooled by halves": lambda x: F.max_pool1d(x.flatten(2), _half(x), _half(x)),
    "averaged to two": lambda x: F.adaptive_avg_pool1d(x.flatten(2), 2),
    "largest to two": lambda x: F.adaptive_max_pool1d(x.flatten(2), 2),
    "interpolated to three": lambda x: F.interpolate(x.flatten(2), size=3),
    "by the length": lambda x: x / x.shape[-1],
    "rolled by the length": lambda x: x.roll(x.shape[-1], 1),
    "channels for positions": lambda x: x.transpose(1, -1).reshape_as(x),
    "grouped by the length": lambda x: x.flatten(1).reshape(len(x), x.shape[-1], -1),
    "two groups": lambda x: x.flatten(1).reshape(len(x), 2, -1),
    "positions first": lambda x: x.movedim(1, -1).flatten(1),
    "by the parity of the length": lambda x: x.abs() if x.shape[-1] % 2 else x,
    "the middle": lambda x: x[..., x.shape[-1] // 2],
    "the middle, kept": lambda x: x.narrow(-1, x.shape[-1] // 2, 1),
}
"""Of a length, and regroupings of channels and positions."""


def _bits(x: Tensor, kind: torch.dtype) -> Tensor:
    return x.float().contiguous().view(kind).clone().view(torch.float32).to(x.dtype)


TYPES = {
    "half and back": lambda x: x.half().to(x.dtype),
    "bfloat16 and back": lambda x: x.to(torch.bfloat16).to(x.dtype),
    "float32 and back": lambda x: x.float().to(x.dtype),
    "doubled in half": lambda x: (x.half() * 2).to(x.dtype),
    "integers": lambda x: x.long().to(x.dtype),
    "small integers": lambda x: x.clamp(-100, 100).to(torch.int8).to(x.dtype),
    "bits as integers": lambda x: _bits(x, torch.int32),
    "bits as bytes": lambda x: _bits(x, torch.uint8),
    "the last bits cut": lambda x: (x.float().contiguous().view(torch.int32) & ~255).view(torch.float32).to(x.dtype),
    "times a narrow number": lambda x: x * torch.tensor(0.3, dtype=torch.float16),
    "times a small integer": lambda x: x * torch.tensor(3, dtype=torch.int8),
    "plus a narrow zero": lambda x: x + torch.tensor(0.0, dtype=torch.bfloat16),
    "plus a narrow one": lambda x: x + torch.tensor(1.0, dtype=torch.float16),
    "times a narrow number of its own": lambda x: x * x.mean().half(),
    "plus its narrow mean": lambda x: x + x.mean().half(),
    "where it is": lambda x: x * (x > 0).to(x.dtype),
    "complex": lambda x: torch.view_as_complex(torch.stack([x, -x], -1)).imag,
}
"""Other types of numbers, and numbers of other types."""


class Table(Kind):
    """Parts of a table of parameters, as many as there are examples or as a length says."""

    forms = (
        "an example each",
        "a channel of an example each",
        "a position each",
        "the last positions",
        "a factor for an example",
        "the row of the number",
        "the row of the length",
        "the mean of the first",
        "looked up",
        "columns",
        "a square",
        "a kernel",
        "a stride",
    )

    def settings(self, pick, shape):
        return {"form": pick(self.forms), "size": pick((16, 4, 6))}

    def module(self, shape, form, size):
        if form in ("an example each", "a factor for an example"):
            return Parameters(table=(size, *[1] * len(shape)))
        if form in ("a channel of an example each", "the row of the number", "the row of the length", "looked up"):
            return Parameters(table=(size, shape[0]))
        if form in ("a position each", "the last positions"):
            return Parameters(table=(shape[0], *[1] * (len(shape) - 2), size) if len(shape) > 1 else (size,))
        if form == "columns":
            return Parameters(table=(2, size))
        if form == "a square":
            return Parameters(table=(size, size))
        if form in ("a kernel", "a stride"):
            return Parameters(table=(2, shape[0], 3 if form == "a kernel" else 1))
        return Parameters(table=(size,))

    def run(self, module, x, form, size):
        table, number, length = module.table, len(x), x.shape[-1]
        ones = [1] * (x.ndim - 2)
        if form == "an example each":
            return x + table[:number]
        if form == "a factor for an example":
            return x * table[:number]
        if form == "a channel of an example each":
            return x + table[:number].reshape(number, -1, *ones)
        if form == "a position each":
            return x + table[..., :length]
        if form == "the last positions":
            return x + table[..., -length:]
        if form in ("the row of the number", "the row of the length"):
            return x + table[number if form == "the row of the number" else length].reshape(-1, *ones)
        if form == "the mean of the first":
            return x + table[:length].mean(0)
        if form == "looked up":
            return x + F.embedding(torch.arange(length), table).t().reshape(-1, *ones[1:], length)
        if form == "columns":
            return F.linear(x, table[:, :length])
        if form == "a square":
            return F.linear(x, table[:length, :length])
        if form == "a kernel":
            return F.conv1d(x.flatten(2), table[..., :length])
        return F.conv1d(x.flatten(2), table, stride=_half(x))


class Recurrence(Kind):
    """A recurrence that is unrolled over the last dimension."""

    positions = True
    forms = ("last", "all", "residual", "sum of all", "backwards", "own start")

    def settings(self, pick, shape):
        return {"form": pick(self.forms), "hidden": pick((2, 1, 3)), "bias": pick((False, True))}

    def module(self, shape, form, hidden, bias):
        shapes = {"weight": (hidden, shape[0]), "again": (hidden, hidden)}
        shapes |= {"bias": (hidden,)} if bias else {}
        return Parameters(**shapes, **({"start": (1, hidden)} if form == "own start" else {}))

    def run(self, module, x, form, hidden, bias):
        x = x.flatten(2)
        state = module.start.expand(len(x), -1) if form == "own start" else x.new_zeros(len(x), hidden)
        states = []
        for place in range(x.shape[-1])[:: -1 if form == "backwards" else 1]:
            entering = F.linear(x[..., place], module.weight, module.bias if bias else None)
            new = F.relu(entering + F.linear(state, module.again))
            state = state + new if form == "residual" else new
            states.append(state)
        if form == "all":
            return torch.stack(states, -1)
        return torch.stack(states).sum(0) if form == "sum of all" else state
