"""Rules for operations: what a rule of one's own needs, and :func:`register_op`, which takes it.

The rules that dagpath has are in :mod:`dagpath.rules`.
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
