"""Are two calls of a model alike, so that one graph stands for both?

Two dry runs with inputs of two sizes make the same calls of functions, with the same arguments, on tensors some of
whose dimensions differ in size: these dimensions *grow*. The neurons of a tensor are **even** if they do not change
along a dimension that grows. Inputs are even (all their entries keep their scale), parameters do not grow, and each
function below makes an even result of even arguments. Where a record has other calls, nothing is known: the second
graph is captured and compared.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence

from torch.utils import _pytree as pytree

from dagpath.capture.dry_run import Called, Place, Record, writes

Shape = tuple[int, ...]

_FILLED_ALIKE = ("zeros_like", "ones_like", "empty_like", "new_zeros", "new_ones", "new_empty")
_VALUES_READ = dict.fromkeys(_FILLED_ALIKE, 0) | dict.fromkeys(
    ("to", "type_as", "expand_as", "view_as", "reshape_as"), 1
)
"""Of so many of their first operands, these functions read the values; of the others, the shape or the type."""


class Source(enum.Enum):
    """What decides the values of a tensor."""

    INPUTS = enum.auto()
    """The inputs: the tensor is even."""

    NOTHING = enum.auto()
    """They are the same in both calls."""

    REPEATED = enum.auto()
    """They are repeated along what grows, and otherwise the same in both calls."""

    SIZES = enum.auto()
    """The sizes: two calls may have anything."""


def _calls(record: Record | None) -> list[Called] | None:
    """What is known of the calls of a dry run."""
    return record.calls if record is not None and record.is_clear else None


def same(record: Record | None, other: Record | None) -> bool:
    """Do two dry runs make the same calls on the same tensors of the same shapes?"""
    calls = _calls(record)
    return calls is not None and calls == _calls(other)


def alike(record: Record | None, other: Record | None) -> bool:
    """Is it certain that the neurons of one call are those of the other, where tensors are larger?"""
    calls, others = _calls(record), _calls(other)
    if calls is None or others is None or len(calls) != len(others):
        return False
    sources = _Sources()
    for number, (call, grown) in enumerate(zip(calls, others, strict=True), 1):
        if not _match(call, grown):
            return False
        pair = _Pair(call, grown)
        rule = _RULES.get(call.name if call.name.endswith("__") else call.name.rstrip("_"))
        filled = [] if writes(call.name) else [place for place in call.written if place.whole]  # by ``out=``
        read = {sources.of(place) for place, _ in pair.tensors[: _VALUES_READ.get(call.name)] if place not in filled}
        if Source.SIZES in read or not (pair.is_equal() or (rule is not None and rule(pair))):
            return False
        sources.know(call, number, _source_of_result(pair, rule, read))
    return True


class Ways:
    """The ways through its code that a model took in calls: which functions it called, in what order.

    Where calls of other sizes call functions other numbers of times (a loop over a sequence), the order is not
    compared. A call is then new if it calls a function that no known call calls, or gives one a parameter that no known
    call gives it.

    Attributes:
        loops: do calls of other sizes make other numbers of calls of functions?
    """

    def __init__(self, records: Sequence[Record | None]) -> None:
        ways = [_way(record) for record in records if record is not None and record.is_clear]
        self._ways, self._steps = set(ways), {step for way in ways for step in way}
        self.loops = len({len(way) for way in ways}) > 1

    def __contains__(self, record: Record) -> bool:
        way = _way(record)
        return way in self._ways or (self.loops and self._steps.issuperset(way))


def _way(record: Record) -> tuple[tuple[object, ...], ...]:
    """Of each call its function, the parameters and buffers among its arguments, and which results have no entry."""
    return tuple(
        (
            call.name,
            *(leaf.origin for leaf in call.leaves if isinstance(leaf, Place) and isinstance(leaf.origin, str)),
            *(0 in shape for shape in call.results),
        )
        for call in record.calls
    )


def _source_of_result(pair: _Pair, rule: _Rule | None, read: set[Source]) -> Source:
    if Source.INPUTS in read:
        return Source.INPUTS
    if pair.is_equal():
        return Source.NOTHING
    repeats = rule is _fills or (read and rule in _KEEP_WHAT_IS_REPEATED)
    return Source.REPEATED if repeats else Source.SIZES


class _Sources:
    """What decides the values of each tensor, after the calls so far."""

    def __init__(self) -> None:
        self._results: dict[object, Source] = {}
        self._written: dict[int, Source] = {}

    def of(self, place: Place) -> Source:
        if place.storage in self._written:
            return self._written[place.storage]
        kind = place.origin[0] if isinstance(place.origin, tuple) else "parameter"
        if isinstance(kind, int):
            return self._results[place.origin]
        return {"input": Source.INPUTS, "parameter": Source.NOTHING, "object": Source.NOTHING}.get(kind, Source.SIZES)

    def know(self, call: Called, number: int, source: Source) -> None:
        """The results of a call have this source, and so has the memory that it writes to, whichever view is read."""
        for place in call.written:
            before = {self.of(place), source} if not place.whole else {source}
            self._written[place.storage] = max(before, key=_STRENGTH.index)
        for position in range(len(call.results) + len(call.written)):
            self._results[number, position] = source


_STRENGTH = [Source.NOTHING, Source.REPEATED, Source.INPUTS, Source.SIZES]
"""A memory that was written to in part has the last of the sources of its parts."""


def _match(call: Called, other: Called) -> bool:
    """Do both calls name one function, with tensors of the same origin and number of dimensions, and results that are
    empty in both or in neither?
    """
    if (call.name, call.structure, len(call.results)) != (other.name, other.structure, len(other.results)):
        return False
    for leaf, grown in zip(call.leaves, other.leaves, strict=True):
        if isinstance(leaf, Place) != isinstance(grown, Place):
            return False
        if isinstance(leaf, Place) and leaf.where() != grown.where():
            return False
    for part, grown in zip(call.written, other.written, strict=True):
        if not (part.whole and grown.whole) and (part.shape, part.memory) != (grown.shape, grown.memory):
            return False  # what is written to is a part of what grows
    results = zip(call.results, other.results, strict=True)
    return all(len(shape) == len(grown) and (0 in shape) == (0 in grown) for shape, grown in results)


class _Pair:
    """Two calls of one function, in which some dimensions have other sizes.

    Attributes:
        call: the first of them.
        tensors: the tensors among their arguments.
        shapes: the shapes of those.
        numbers: all other arguments.
        results: the shapes that they return.
    """

    def __init__(self, call: Called, other: Called) -> None:
        self.call = call
        pairs = list(zip(call.leaves, other.leaves, strict=True))
        self.tensors = [(a, b) for a, b in pairs if isinstance(a, Place)]
        self.shapes = [(a.shape, b.shape) for a, b in self.tensors]
        self.numbers = [(a, b) for a, b in pairs if not isinstance(a, Place)]
        self.results = list(zip(call.results, other.results, strict=True))

    def is_equal(self) -> bool:
        """Are the arguments of one size, and the results?"""
        return self.same_numbers() and all(a == b for a, b in [*self.shapes, *self.results])

    def same_numbers(self) -> bool:
        return all(type(a) is type(b) and a == b for a, b in self.numbers)

    def grows(self, start: int = 0) -> bool:
        """Does any of the tensors from this position on grow?"""
        return any(a != b for a, b in self.shapes[start:])


_Rule = Callable[[_Pair], bool]


# -- shapes -----------------------------------------------------------------------------------------------------------


def _grown(shape: Shape, other: Shape) -> list[bool]:
    return [a != b for a, b in zip(shape, other, strict=True)]


def _broadcasts(operands: Sequence[tuple[Shape, Shape]], result: tuple[Shape, Shape]) -> bool:
    """Do the operands broadcast in the same way: along what grows, each grows or has one entry?"""
    for place in range(1, len(result[0]) + 1):
        aligned = [(a[-place], b[-place]) for a, b in operands if len(a) >= place]
        grows = result[0][-place] != result[1][-place]
        if any(a != b for a, b in aligned) != grows:
            return False
        if grows and any(a == b != 1 for a, b in aligned):
            return False
        ones = [(a == 1) != (b == 1) for a, b in aligned]
        if any(ones) and not all(a == b == 1 or a != b for a, b in aligned):
            return False
    return True


def _blocks(shape: Shape, result: Shape) -> list[tuple[Shape, Shape]] | None:
    """The shortest runs of dimensions that a regrouping maps to each other."""
    found, i, j = [], 0, 0
    while i < len(shape) or j < len(result):
        start, begin = i, j
        i, j = min(i + 1, len(shape)), min(j + 1, len(result))
        while (sizes := (math.prod(shape[start:i]), math.prod(result[begin:j])))[0] != sizes[1]:
            if sizes[0] < sizes[1] and i < len(shape):
                i += 1
            elif j < len(result):
                j += 1
            else:
                return None
        found.append((shape[start:i], result[begin:j]))
    return found


# -- what functions do with what grows --------------------------------------------------------------------------------


def _elementwise(pair: _Pair) -> bool:
    """Entry by entry, and results in the shape of their operands."""
    return pair.same_numbers() and all(_broadcasts(pair.shapes, result) for result in pair.results)


def _fills(pair: _Pair) -> bool:
    """One number everywhere, in a shape that is given."""
    return all(type(a) is type(b) and (type(a) is int or a == b) for a, b in pair.numbers)


def _of_a_shape(pair: _Pair) -> bool:
    """Constants that depend on a shape."""
    return True


def _as_it_is(pair: _Pair) -> bool:
    """What grows stays where it is, or whole dimensions change their places, or positions are mixed."""
    return pair.same_numbers()


def _regroups(pair: _Pair) -> bool:
    """Entries in their old order in another shape: what grows and what does not stay apart."""
    shapes, results = pair.shapes[0], pair.results[0]
    blocks = [_blocks(shape, result) for shape, result in zip(shapes, results, strict=True)]
    if blocks[0] is None or blocks[1] is None or len(blocks[0]) != len(blocks[1]):
        return False
    for (a, a_result), (b, b_result) in zip(*blocks, strict=True):
        if len(a) != len(b) or len(a_result) != len(b_result):
            return False
        for shape, other in ((a, b), (a_result, b_result)):
            grows = [x != y for x, y in zip(shape, other, strict=True)]
            if (a, a_result) != (b, b_result) and not all(
                grown or x == y == 1 for grown, x, y in zip(grows, shape, other, strict=True)
            ):
                return False
    return True


def _expands(pair: _Pair) -> bool:
    """Dimensions of one entry are repeated; what has more stays as it is."""
    (shape, grown), (result, result_grown) = pair.shapes[0], pair.results[0]
    sizes = zip(shape[::-1], grown[::-1], result[::-1], result_grown[::-1], strict=False)
    return all(a == b == 1 or (a, b) == (c, d) for a, b, c, d in sizes)


def _joins(pair: _Pair) -> bool:
    """Tensors side by side, along a dimension in which none of them grows."""
    if not pair.same_numbers() or not pair.results:
        return False
    dims = [a for a, _ in pair.numbers if type(a) is int]
    dim = dims[0] if dims else 0
    if any(-len(a) > dim or dim >= len(a) for a, _ in pair.shapes):
        return False
    return all(a[dim] == b[dim] for a, b in pair.shapes) and len({tuple(_grown(a, b)) for a, b in pair.shapes}) == 1


def _stacks(pair: _Pair) -> bool:
    return pair.same_numbers() and len({tuple(_grown(a, b)) for a, b in pair.shapes}) == 1


def _splits(pair: _Pair) -> bool:
    """Parts along a dimension that does not grow: they have the sizes of the whole but for that one."""
    if not pair.same_numbers() or not pair.results:
        return False
    dims = [
        dim for dim, (size, part) in enumerate(zip(pair.shapes[0][0], pair.results[0][0], strict=True)) if size != part
    ]
    grows = _grown(*pair.shapes[0])
    return all(_grown(*result) == grows for result in pair.results) and not any(grows[dim] for dim in dims)


def _indexes(pair: _Pair) -> bool:
    """The same indices, or such as depend on the inputs, which fixes what they index; or rows of a table."""
    return pair.same_numbers() and not pair.grows(1)


def _layer(channels: Callable[[Shape, Shape], int]) -> Callable[[_Pair], bool]:
    """A layer with parameters: those, and the dimension of the input that they read, do not grow."""

    def rule(pair: _Pair) -> bool:
        if not pair.same_numbers() or len(pair.shapes) < 1 or pair.grows(1):
            return False
        (x, grown), weight = pair.shapes[0], pair.shapes[1][0] if len(pair.shapes) > 1 else ()
        dim = channels(x, weight)
        return -len(x) <= dim < len(x) and x[dim] == grown[dim]

    return rule


def _mixes(pair: _Pair) -> bool:
    """Entries are summed or chosen from along dimensions: those that grow are even."""
    return pair.same_numbers() if len(pair.shapes) == 1 else _elementwise(pair)


def _recurs(pair: _Pair) -> bool:
    """Step by step, each example by itself, from a first state that is even."""
    x, grown = pair.shapes[0]
    return pair.same_numbers() and x[-1] == grown[-1]


def _rolls(pair: _Pair) -> bool:
    """Entries move along the dimensions that are given. Without any, the tensor is flattened first."""
    return pair.same_numbers() and sum(a is not None for a, _ in pair.numbers) > 1


def _pads(pair: _Pair) -> bool:
    """Entries are added at the ends of dimensions that do not grow."""
    args, kwargs = pytree.tree_unflatten(pair.call.leaves, pair.call.structure)
    widths = kwargs["pad"] if "pad" in kwargs else args[1]
    added = [dim for dim in range(len(widths) // 2) if widths[2 * dim] or widths[2 * dim + 1]]
    grows = _grown(*pair.shapes[0])[::-1]
    return pair.same_numbers() and not any(grows[dim] for dim in added)


def _multiplies(pair: _Pair) -> bool:
    """A matrix product; what does not grow is not met by what does along the dimensions before the matrices."""
    if not pair.same_numbers() or len(pair.shapes) != 2:
        return False
    (a, a_grown), (b, b_grown) = pair.shapes
    rows = [(a[:-2], a_grown[:-2]), (b[:-2], b_grown[:-2])]
    result = tuple(shape[: max(len(a), len(b)) - 2] for shape in pair.results[0])
    return min(len(a), len(b)) < 3 or _broadcasts(rows, (result[0], result[1]))


def _resizes(pair: _Pair) -> bool:
    """Positions are repeated or interpolated: along what grows, or in the same way; a single one is repeated."""
    (x, grown), (result, result_grown) = pair.shapes[0], pair.results[0]
    positions = [
        (a != b and c != d) or a == b == 1
        for a, b, c, d in zip(x[2:], grown[2:], result[2:], result_grown[2:], strict=True)
    ]
    return x[1:2] == grown[1:2] and (pair.same_numbers() or all(positions))


_reads_last = _layer(lambda x, weight: -1)

_KEEP_WHAT_IS_REPEATED = (_reads_last, _elementwise, _regroups, _expands, _joins, _stacks, _splits, _indexes)

_NAMES: dict[_Rule, str] = {
    _elementwise: """
        relu leaky_relu prelu rrelu sigmoid tanh gelu silu mish elu selu celu hardtanh relu6 hardswish hardsigmoid
        softplus logsigmoid softsign dropout dropout1d dropout2d dropout3d add sub mul div neg abs true_divide multiply
        subtract negative exp log log1p sqrt rsqrt pow square reciprocal erf sin cos floor ceil round sign clamp
        clamp_min clamp_max where maximum minimum masked_fill lt le gt ge eq ne logical_and logical_or logical_not
        bitwise_and bitwise_or bitwise_not isnan isinf to type_as float double half bfloat16 long int bool contiguous
        clone detach alias data grad __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__
        __truediv__ __itruediv__ __neg__ __abs__ __pow__ __lt__ __le__ __gt__ __ge__ __eq__ __ne__ __invert__ __and__
        __or__""",
    _fills: " ".join(("zeros", "ones", "empty", *_FILLED_ALIKE)),
    _of_a_shape: """
        arange linspace size dim numel stride __len__ is_floating_point is_complex element_size nelement ndimension
        is_contiguous storage_offset _assert""",
    _regroups: "view reshape flatten unflatten view_as reshape_as ravel",
    _as_it_is: """
        permute transpose t swapaxes swapdims movedim moveaxis unsqueeze squeeze flip T mT H mH unbind output
        channel_shuffle scaled_dot_product_attention multi_head_attention_forward""",
    _expands: "expand expand_as broadcast_to",
    _joins: "cat concat concatenate",
    _stacks: "stack",
    _splits: "chunk split split_with_sizes tensor_split",
    _indexes: "__getitem__ select narrow embedding",
    _reads_last: "linear layer_norm rms_norm",
    _layer(lambda x, weight: 1 - len(weight)): """
        conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d""",
    _layer(lambda x, weight: 1): "batch_norm group_norm instance_norm",
    _mixes: """
        mean sum amax amin max min std var softmax log_softmax logsumexp norm normalize argmax argmin cumsum any all
        max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
        adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d""",
    _multiplies: "matmul bmm mm __matmul__",
    _pads: "pad",
    _rolls: "roll",
    _recurs: "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell",
    _resizes: "interpolate upsample",
}
_RULES = {name: rule for rule, names in _NAMES.items() for name in names.split()}
