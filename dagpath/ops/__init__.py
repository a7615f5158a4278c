"""The operations dagpath knows, one file per family; importing this package registers them all."""

from dagpath.ops import elementwise, linear, movement, normalization, pooling, resample
from dagpath.ops.base import Operation, Unknown, operation_of, register, registered
from dagpath.ops.user import register_op

__all__ = [
    "Operation",
    "Unknown",
    "elementwise",
    "linear",
    "movement",
    "normalization",
    "operation_of",
    "pooling",
    "register",
    "register_op",
    "registered",
    "resample",
]
