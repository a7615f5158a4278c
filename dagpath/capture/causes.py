"""Why a model cannot be captured, in words that say what to do."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree
from tqdm import TMonitor

from dagpath.errors import CaptureError
from dagpath.runtime.distributed import has_all_values

_PACKED = (
    "A packed sequence has a shape that depends on the lengths, which no graph can hold: run the recurrent layer on "
    "the padded sequence, and mask what lies behind the lengths."
)

_CAUSES: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("packed_sequence", "pack_padded_sequence", "pack_sequence", "PackedSequence"),
        _PACKED,
    ),
    (
        ("fake tensor in the exported program constant",),
        "The forward makes a tensor in a way that the exporter does not see: from NumPy, from memory that another "
        "library holds, or as a gradient that it computes itself (backward, torch.autograd.grad). Make constants with "
        "functions of PyTorch, or once, as buffers; trace the submodule that computes no gradient.",
    ),
    (
        (".numpy() is not supported", "can't convert", "numpy"),
        "The forward leaves PyTorch for NumPy, where no graph can follow: use functions of PyTorch, or make what does "
        "not depend on the input once, as a buffer.",
    ),
    (
        ("functorch tensor", "no attribute 'constant'"),
        "A transform of torch.func inside the forward (grad, jacrev, vmap of these) has no form that the exporter "
        "knows: trace the module that it transforms.",
    ),
    (
        ("s .data of shape",),
        "Give the new value to the module's attribute instead, or copy into the tensor.",
    ),
    (
        ("expression zuf", "SymFloat", "specialized integer", "SymInt.__format__"),
        "A number that is read from a tensor (float(t), int(t), t.item()) is not known while the graph is made: leave "
        "it a tensor, or compute it once, outside of the forward.",
    ),
    (
        ("data-dependent", "DataDependent", "unbacked", "_local_scalar_dense", "Eq(u", "is_nonzero", "symbolic"),
        "A graph needs control flow that does not depend on the values of the input: replace such a branch by "
        "torch.where or torch.cond, or trace the submodule that does not contain it.",
    ),
    (
        ("Sparse", "sparse", "layout"),
        "An operation on sparse tensors has no form that the exporter knows: pass or keep the tensor dense, or as "
        "indices and values that index_add puts in their places.",
    ),
    (
        ("DynamicOutputShape", "nonzero", "masked_select", "unique"),
        "The shape of a result depends on the values of the input (nonzero, unique, a boolean mask): keep the shape "
        "and put zeros instead, as torch.where does.",
    ),
    (
        ("draws random numbers in Python",),
        "Draw with PyTorch's own functions, or make the decision depend on self.training alone.",
    ),
)
"""Words of messages, and what to do about what they say."""

_NO_VALUES = (
    "This model was made without values (on the meta device, say): if it computes with tensors of its own, such as "
    "tables, make it with values."
)
_THREADS = (
    "Other threads are alive: PyTorch's exporter fails where one of them runs a module meanwhile, be it of another "
    "model; trace while none does."
)


def cause_of(model: nn.Module, text: str) -> str:
    """What is likely to be the cause of a failure of the exporter, and what to do, from its messages and its line."""
    found = [*_parts(model), *(advice for words, advice in _CAUSES if any(word in text for word in words))][:1]
    if not found:
        found = [
            "PyTorch's exporter cannot follow this model: torch.export.export(model, args, strict=False) says more."
        ]
    if not has_all_values(model):
        found.append(_NO_VALUES)
    if len([thread for thread in threading.enumerate() if not isinstance(thread, TMonitor)]) > 1:  # progress bars
        found.append(_THREADS)
    return "\n  ".join(found)


def messages(failure: BaseException) -> str:
    """The messages of an error and of those that it comes from; and a word for what no message names."""
    found: list[str] = []
    current: BaseException | None = failure
    while current is not None and len(found) < 10:
        found.append(f"{type(current).__name__}: {current}")
        held = (value for frame, _ in traceback.walk_tb(current.__traceback__) for value in frame.f_locals.values())
        if any(isinstance(value, PackedSequence) for value in held):
            found.append("PackedSequence")
        current = current.__cause__ or current.__context__
    return "\n".join(found)


def check_model(model: nn.Module) -> None:
    """Raise CaptureError for a model of which no graph can be made, whatever its inputs are."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise CaptureError(
            "a model is traced outside of vmap, grad and the other transforms of torch.func: trace it first, and use "
            "the result inside"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"{type(model).__name__} is a TorchScript module, which holds no Python code to capture; trace the "
            "torch.nn.Module that it was made from"
        )
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise CaptureError(f"the parameter {lazy[0]!r} has no shape yet: run the model once before tracing it")
    if {id(parameter) for parameter in model.parameters()} != {
        id(parameter) for _, parameter in model.named_parameters()
    }:
        raise CaptureError(
            f"{type(model).__name__} overrides parameters() or named_parameters(), and they give different parameters: "
            "only where they agree can the parameters be told by their names"
        )
    named: Iterator[tuple[str, Tensor]] = iter([*model.named_parameters(), *model.named_buffers()])
    for name, tensor in named:
        if tensor.is_inference():
            raise CaptureError(
                f"{name!r} was made inside torch.inference_mode(), so that nothing can be derived from it or change it "
                "in place: make or load the model outside of inference mode"
            )


def check_inputs(given: Any) -> None:
    """Raise CaptureError for inputs that no graph can have."""
    leaves = pytree.tree_leaves(given, is_leaf=lambda leaf: isinstance(leaf, PackedSequence))
    if any(isinstance(leaf, PackedSequence) for leaf in leaves):
        raise CaptureError(f"an input is a PackedSequence. {_PACKED}")
    if any(isinstance(leaf, Tensor) and leaf.is_nested for leaf in leaves):
        raise CaptureError("an input is a nested tensor, whose parts differ in shape: pass a padded tensor and a mask")


def _parts(model: nn.Module) -> Iterator[str]:
    """Submodules that no graph can be made of, in words."""
    for name, part in model.named_modules():
        module = type(part).__module__
        if isinstance(part, torch.jit.ScriptModule):
            yield f"The submodule {name!r} is a TorchScript module, without Python code: use what it was made from."
        elif ".quantized" in module or ".qat" in module or ".intrinsic" in module:
            yield f"The submodule {name!r} ({type(part).__name__}) is quantized: trace the model before that."
        elif "quantization" in module and "Stub" not in type(part).__name__:
            yield (
                f"The submodule {name!r} ({type(part).__name__}) prepares the model for quantization: trace and "
                "rescale the model before that."
            )
