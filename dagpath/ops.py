"""What a rule for an operation of one's own needs, and :func:`dagpath.register_op`, which takes it.

The rules that dagpath has are in the folder ``rules``, one file per family.
"""

from dagpath.passes.neurons import NeuronFlow
from dagpath.passes.paths import Gate, PathFlow
from dagpath.passes.values import FIXED, ZERO, Call, Operand, Weight
from dagpath.rules import Operation, register_op, registered

__all__ = [
    "FIXED",
    "ZERO",
    "Call",
    "Gate",
    "NeuronFlow",
    "Operand",
    "Operation",
    "PathFlow",
    "Weight",
    "register_op",
    "registered",
]
