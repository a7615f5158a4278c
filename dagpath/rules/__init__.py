"""The operations that dagpath knows, one file per family; importing this package registers them all."""

from dagpath.rules import (  # noqa: F401 (which registers their operations)
    attention,
    compound,
    elementwise,
    indexing,
    linear,
    movement,
    normalization,
    pooling,
    resample,
)
from dagpath.rules.base import Operation, registered
from dagpath.rules.user import register_op

__all__ = ["Operation", "register_op", "registered"]
