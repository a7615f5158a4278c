"""The operations dagpath knows, one file per family; importing this package registers them all."""

from dagpath.ops import compound, elementwise, linear, movement, normalization, pooling, resample
from dagpath.ops.base import Operation, Unknown, operation_of, register, registered
from dagpath.ops.compound import is_compound
from dagpath.ops.user import register_op

__all__ = [
    "Operation",
    "Unknown",
    "compound",
    "elementwise",
    "is_compound",
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
