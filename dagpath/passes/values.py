"""The values that travel through the graph in place of activations, and the call that an operation answers."""

from __future__ import annotations

import copy
import functools
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

FIXED = 0
"""The neuron number of everything that keeps its scale: inputs, constants, results of unknown operations."""

ZERO = -1
"""The neuron number of an entry that is always zero (padding): it is right under any scale, so it ties nothing."""


NOTHING = -(1 << 30)
"""The magnitude of a mass of zero."""


@dataclass(frozen=True)
class Weight:
    """A parameter on its way to the operation that uses it: which element stands in each entry.

    What is computed from parameters alone (a sum or a product of them) is a parameter too, a virtual one.

    Attributes:
        shape: shape of this tensor.
        name: the parameter, while its elements stand in their own order; None after they were moved.
        elements: int64 tensor of ``shape``, numbers of the elements over all parameters; None while ``name`` is set.

    Example:
        >>> import torch, dagpath
        >>> from dagpath.ops import Operation
        >>> @torch.library.custom_op("dagpath_example::shifted", mutates_args=())
        ... def shifted(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        ...     return x + shift
        >>> _ = shifted.register_fake(lambda x, shift: torch.empty_like(x))
        >>> seen = []
        >>> class Shifted(Operation):
        ...     def neurons(self, flow, call):
        ...         seen.append(call["shift"])
        ...         return flow.constant(call.output)
        >>> dagpath.register_op(shifted, Shifted())
        >>> class Net(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.shift = torch.nn.Parameter(torch.zeros(2))
        ...     def forward(self, x):
        ...         return shifted(x, self.shift)
        >>> _ = dagpath.trace(Net(), torch.zeros(1, 2))
        >>> seen[0]
        Weight(shape=torch.Size([2]), name='shift', elements=None)
    """

    shape: torch.Size
    name: str | None = None
    elements: Tensor | None = None


class Operand:
    """What stands for a tensor in a pass over paths: a mass, nodes, or the weights of edges.

    Attributes:
        data: does it depend on the input of the network or on a barrier (then it is an activation)?
        params: does it depend on a parameter?
        node: the node of the graph that made it.

    Example:
        >>> import torch, dagpath
        >>> from dagpath.ops import Operation
        >>> seen = []
        >>> class Doubled(Operation):
        ...     def neurons(self, flow, call):
        ...         return call["x"]
        ...     def paths(self, flow, call):
        ...         x = call["x"]
        ...         seen.append((x.shape, x.data, x.params))
        ...         return flow.sum(x.shape, [(x, 2.0)])
        >>> @torch.library.custom_op("dagpath_example::doubled", mutates_args=())
        ... def doubled(x: torch.Tensor) -> torch.Tensor:
        ...     return 2 * x
        >>> _ = doubled.register_fake(torch.empty_like)
        >>> dagpath.register_op(doubled, Doubled())
        >>> class Net(torch.nn.Module):
        ...     def forward(self, x):
        ...         return doubled(x)
        >>> dagpath.path_norm(dagpath.trace(Net(), torch.zeros(4, 3)))  # of one example
        6.0
        >>> seen
        [(torch.Size([1, 3]), True, False)]
    """

    data: bool
    params: bool
    node: fx.Node | None

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor."""
        raise NotImplementedError


@dataclass(frozen=True)
class Mass(Operand):
    """A tensor of path masses ``values * 2**log2_scale``, one mass per entry.

    Attributes:
        values: float64 (or float32) tensor, non-negative.
        log2_scale: the power of two beside it, so that no mass leaves the floating-point range.
        zero: are all values zero? Then other masses need not be aligned with this one.
        data: does it depend on the input of the network (or on what leaves an operation that cuts paths)?
        params: does it depend on a parameter?
        node: the node of the graph that made it.
    """

    values: Tensor
    log2_scale: int = 0
    zero: bool = False
    data: bool = False
    params: bool = False
    node: fx.Node | None = field(default=None, repr=False)

    def on(self, values: Tensor) -> Mass:
        """The same mass with its values in other memory."""
        return Mass(values, self.log2_scale, self.zero, self.data, self.params, self.node)

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def magnitude(self) -> int:
        """The log2_scale to which others are aligned; below all others for a mass of zero."""
        return NOTHING if self.zero else self.log2_scale

    @property
    def made(self) -> Mass:
        """The mass itself, also of one that is made :class:`Later`."""
        return self


@dataclass(frozen=True)
class Watched(Mass):
    """The mass of a parameter whose derivatives are wanted.

    Attributes:
        base: the log2_scale of the values that the derivatives belong to. Of a mass of zero that is used once any is
            right: empty until that use, which says what suits. (A bias of zero is common, its neighbours may be
            2**-1000.)
    """

    base: list[int] = field(default_factory=list, repr=False)


class Later(Mass):
    """The mass of a parameter or a constant, made when it is first read, if ever.

    Parameters whose masses are not all there at once share memory; statistics are mostly read as the numbers they are.
    """

    _held: list[Mass | Callable[[fx.Node], Mass]]

    def __new__(cls, *given: Any, **fields: Any) -> Any:
        """With fields by name, as :func:`dataclasses.replace` gives them, a mass that is there."""
        return Mass(**fields) if fields else super().__new__(cls)

    def __init__(self, make: Callable[[fx.Node], Mass], params: bool, node: fx.Node) -> None:
        self.__dict__.update(_held=[make], params=params, data=False, node=node)  # a mass is frozen

    @property
    def made(self) -> Mass:
        [held] = self._held  # which copies of this share
        if not isinstance(held, Mass):
            assert self.node is not None
            held = self._held[0] = held(self.node)  # what made it refers to the flow, and is let go
        return held

    @property
    def shape(self) -> torch.Size:
        assert self.node is not None
        shape: torch.Size = self.node.meta["val"].shape
        return shape

    @property
    def values(self) -> Tensor:
        return self.made.values

    @property
    def log2_scale(self) -> int:
        return self.made.log2_scale

    @property
    def zero(self) -> bool:
        return self.made.zero


def uses(node: fx.Node) -> int:
    """How often calls name a node among their arguments."""
    return sum(leaves((user.args, user.kwargs), fx.Node).count(node) for user in node.users)


def is_fetched(mass: Mass) -> bool:
    """Is it the mass of a parameter that is used once?"""
    return isinstance(mass, Later) and mass.params and mass.node is not None and uses(mass.node) == 1


@dataclass(frozen=True)
class Call:
    """One call of an operation: its target and its arguments, by position and by the names of its schema.

    ``call["x"]`` is the argument x, also where it was not given and has a default. The schema's ``self`` is called
    ``input`` here.

    Attributes:
        target: the operation.
        args: its arguments by position; tensors are neuron numbers, masses or weights, as the pass has them.
        kwargs: those by name.
        node: the node of the captured graph.
        result: what the operation returned, in a call on real values.

    Raises:
        KeyError: (``call[name]``) the schema has no such argument.

    Example:
        >>> import torch, dagpath
        >>> from dagpath.ops import Operation
        >>> @torch.library.custom_op("dagpath_example::repeated", mutates_args=())
        ... def repeated(x: torch.Tensor, times: int = 2) -> torch.Tensor:
        ...     return x.repeat(1, times)
        >>> _ = repeated.register_fake(lambda x, times=2: x.new_empty(x.shape[0], times * x.shape[1]))
        >>> seen = []
        >>> class Repeated(Operation):
        ...     def neurons(self, flow, call):
        ...         seen.append((call["x"].shape, call["times"], call.output.shape, call.get("dim", "no dim")))
        ...         return call["x"].repeat(1, call["times"])
        >>> dagpath.register_op(repeated, Repeated())
        >>> class Net(torch.nn.Module):
        ...     def forward(self, x):
        ...         return repeated(x)
        >>> _ = dagpath.trace(Net(), torch.zeros(1, 3))
        >>> seen[0]  # of the example; a trace looks at other sizes too
        (torch.Size([1, 3]), 2, torch.Size([1, 6]), 'no dim')
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    node: fx.Node
    result: Any = None

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The arguments by the names of the schema, defaults among them."""
        bound: dict[str, Any] = {}
        for position, (name, argument) in enumerate(_signature(self.target)):
            if position < len(self.args) and not argument.kwarg_only:
                bound[name] = self.args[position]
            elif argument.name in self.kwargs:
                bound[name] = self.kwargs[argument.name]
            elif argument.has_default_value():
                bound[name] = argument.default_value
        return bound

    def __getitem__(self, name: str) -> Any:
        """The argument of that name."""
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The argument of that name, or the default where the schema has none."""
        return self.arguments.get(name, default)

    def on(self, values: Mapping[fx.Node, Any]) -> Call:
        """The same call on real values, given by node."""
        args, kwargs = fx.node.map_arg((self.node.args, dict(self.node.kwargs)), values.__getitem__)
        return Call(self.target, args, kwargs, self.node, values[self.node])

    @property
    def output(self) -> Any:
        """What the operation returns, as fake tensors, which have shapes and types without values."""
        return self.node.meta.get("val")

    def keeps_range(self, result: Tensor, numbers: bool = False) -> bool:
        """Do products with powers of two pass to this result unchanged, as far as its type goes?

        They leave the range of integers at once, and that of float16 easily, where the arguments have a wider one.
        Zero-dimensional tensors beside others count if ``numbers`` says so: where they carry a scale of their own.
        """
        if _range(result) is None:
            return False
        given = [
            leaf for leaf in (node.meta.get("val") for node in self.node.all_input_nodes) if isinstance(leaf, Tensor)
        ]
        tensors = given if numbers else [value for value in given if value.ndim] or given
        return _range(result) == _WIDE or _WIDE not in [_range(value) or 0.0 for value in tensors]

    def leaves(self, kind: type | tuple[type, ...]) -> list[Any]:
        """The arguments of the given type or types, those inside lists too, in their order."""
        return leaves((self.args, self.kwargs), kind)

    def apart(self) -> Call:
        """The same call with a copy of every operand: one that is given twice can be told apart."""
        return self.converted(lambda leaf: copy.copy(leaf) if isinstance(leaf, Operand) else leaf)

    def as_function_of(self, *operands: Operand | None) -> Callable[..., Any]:
        """The operation as a function of tensors in the places of these operands, each given once."""

        def function(*tensors: Tensor | None) -> Any:
            given = {id(operand): tensor for operand, tensor in zip(operands, tensors, strict=True)}
            return self.run(lambda leaf: given.get(id(leaf), leaf))

        return function

    def converted(self, convert: Callable[[Any], Any]) -> Call:
        """The same call of what ``convert`` makes of each argument, of those inside lists one by one."""
        args, kwargs = mapped((self.args, self.kwargs), object, convert)
        return Call(self.target, args, kwargs, self.node)

    def run(self, convert: Callable[[Any], Any] = lambda leaf: leaf) -> Any:
        """Execute the operation itself on converted arguments.

        Args:
            convert: gets each argument, those inside lists one by one, and returns what stands in its place.

        Returns:
            What the operation returns.
        """
        call = self.converted(convert)
        return _ANY_STRIDES.get(self.target, self.target)(*call.args, **call.kwargs)


@functools.cache
def _signature(target: Any) -> list[tuple[str, Any]]:
    """The arguments in the ATen schema of an operation, by name."""
    arguments = target._schema.arguments
    return [("input" if argument.name == "self" else argument.name, argument) for argument in arguments]


_WIDE = torch.finfo(torch.float32).tiny


def _range(tensor: Tensor) -> float | None:
    """The smallest normal number of a tensor's type, or the one of float32 if that is larger; None for integers."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    return max(torch.finfo(tensor.dtype).tiny, _WIDE)


_ANY_STRIDES: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default: torch.ops.aten.reshape.default,
}
"""Operations that refuse some memory layouts, and their equals that take all: expanded numbers have any layout."""


def mapped(tree: Any, kind: type | tuple[type, ...], change: Callable[[Any], Any]) -> Any:
    """The arguments or the results of calls (tuples, lists and dictionaries) with all that is of a type changed."""
    return fx.node.map_aggregate(tree, lambda leaf: change(leaf) if isinstance(leaf, kind) else leaf)


def leaves(tree: Any, kind: type | tuple[type, ...]) -> list[Any]:
    """All that is of a type in the arguments or the results of calls, in their order."""
    found: list[Any] = []
    mapped(tree, kind, found.append)
    return found


_NUMBERS = (int, float, complex)


def is_count(value: object) -> bool:
    """Is it an integer of at least 1, Python's or NumPy's?"""
    return isinstance(value, numbers.Integral) and int(value) >= 1


def plain(value: Any) -> float | None:
    """A number as a float; None for a symbolic one, which depends on the values of the input (``tensor.item()``)."""
    return float(abs(value) if isinstance(value, complex) else value) if isinstance(value, _NUMBERS) else None


def is_scaleless(value: float | None) -> bool:
    """Is a number right under any positive scale? Zero and both infinities are."""
    return value is not None and (value == 0 or math.isinf(value))


LARGEST_STEP = {torch.float64: 1000, torch.float32: 120}
"""Powers of two by which tensors are multiplied at once; three of them lead from one end of the range to the other."""


def ldexp_(tensor: Tensor, log2_scale: int) -> Tensor:
    """``tensor · 2**log2_scale`` in place, by multiplications: :func:`torch.ldexp` takes longer."""
    step = LARGEST_STEP[tensor.dtype]
    log2_scale = max(-3 * step, min(log2_scale, 3 * step))
    while log2_scale:
        now = max(-step, min(step, log2_scale))
        tensor.mul_(2.0**now)
        log2_scale -= now
    return tensor


def broadcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """:func:`torch.broadcast_tensors`, with types."""
    return tuple(torch.broadcast_tensors(*tensors))  # type: ignore[no-untyped-call]


def expanded(tensor: Tensor) -> Tensor:
    """``tensor`` with the dimensions along which it is constant made so by their stride, 0: later operations on it are
    then as cheap as on what it repeats.
    """
    shape = tensor.shape
    for dim, size in enumerate(shape):
        if (
            size > 1
            and tensor.stride(dim)
            and torch.equal(tensor.narrow(dim, 1, size - 1), tensor.narrow(dim, 0, size - 1))
        ):
            tensor = tensor.narrow(dim, 0, 1)
    return tensor.expand(shape)


def compact(tensor: Tensor, dims: Iterable[int] | None = None) -> Tensor:
    """``tensor`` with its expanded (stride 0) dimensions narrowed to size 1, among ``dims`` or everywhere."""
    for dim in range(tensor.ndim) if dims is None else dims:
        if tensor.stride(dim) == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def dense(tensor: Tensor) -> Tensor:
    """A tensor with all of its entries in memory."""
    return tensor if tensor.layout is torch.strided else tensor.to_dense()
