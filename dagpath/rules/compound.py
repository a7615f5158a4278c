"""Operations that PyTorch makes of others: the capture replaces them, so that they need no rules of their own."""

from __future__ import annotations

from typing import Any

from dagpath.rules.base import Unknown, operation_of, register


class Compound(Unknown):
    """Made of other operations, which replace it in the captured graph. Where PyTorch does not say which, no rule."""


def is_compound(target: Any) -> bool:
    """Is a call's target to be replaced by what it is made of?"""
    return isinstance(operation_of(target), Compound)


register(
    Compound(),
    *("addcmul", "addcdiv", "lerp", "rsub.Tensor", "glu", "threshold", "subtract", "negative", "absolute", "outer"),
    *("ger", "inner", "dot", "vdot", "mv", "addmv", "addr", "tensordot", "kron", "linalg_matmul", "linalg_multi_dot"),
    *("chain_matmul", "linalg_vecdot", "trace", "cross", "linalg_cross", "diag", "diagflat", "block_diag", "take"),
    *("column_stack", "row_stack", "fliplr", "flipud", "index_copy", "sum_to_size", "nansum", "nanmean"),
    *("max_unpool2d", "max_unpool3d", "_pad_circular", "t_copy", "transpose_copy", "expand_copy", "diagonal_copy"),
    *("unfold_copy", "unsqueeze_copy", "split_with_sizes_copy", "alias_copy"),
)
