"""The operations dagpath knows, one file per family; importing this package registers them all.

What a rule of one's own needs stands here too: the base class, and the types of what it is given.
"""

from dagpath.flow.masses import MassFlow
from dagpath.flow.neurons import NeuronFlow
from dagpath.flow.values import FIXED, ZERO, Call, Mass, Weight
from dagpath.ops import attention, compound, elementwise, linear, movement, normalization, pooling, resample
from dagpath.ops.base import Operation, Unknown, operation_of, register, registered
from dagpath.ops.compound import is_compound
from dagpath.ops.user import register_op

__all__ = [
    "FIXED",
    "ZERO",
    "Call",
    "Mass",
    "MassFlow",
    "NeuronFlow",
    "Operation",
    "Unknown",
    "Weight",
    "attention",
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
