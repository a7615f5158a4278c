"""Models that several processes train together, with PyTorch's own engine.

Every process runs the same program, as PyTorch's do: what is called by one is called by all, in the same order.
Parameters that are spread over processes (by ``fully_shard`` or ``parallelize_module``) are of type ``DTensor``.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dagpath.errors import BalanceError
from dagpath.runtime.fetched import Fetched


def imported(module: str, name: str) -> tuple[type, ...]:
    """A class of PyTorch that takes long to import, if it was imported: else nothing can be of that type."""
    found = getattr(sys.modules.get(module), name, None)
    return () if found is None else (found,)


def is_spread(tensor: object) -> bool:
    """Do several processes hold the tensor together?"""
    return isinstance(tensor, imported("torch.distributed.tensor", "DTensor"))


def whole(tensor: Any) -> Tensor:
    """All of a tensor, gathered from the processes that hold it, without a history."""
    found: Tensor = tensor.detach().full_tensor() if is_spread(tensor) else tensor.detach()
    return found


def own(tensor: Any) -> Tensor:
    """The part of a tensor that this process holds, in the same memory."""
    found: Tensor = tensor.to_local() if is_spread(tensor) else tensor
    return found


def own_part(of: Tensor, tensor: Any) -> Tensor:
    """The part of ``of``, which broadcasts to ``tensor``, that meets what this process holds of ``tensor``."""
    if not is_spread(tensor):
        return of
    from torch.distributed.tensor import distribute_tensor

    expanded = of.expand(tensor.shape)
    part = distribute_tensor(expanded, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
    for dim, size in enumerate((1,) * (tensor.ndim - of.ndim) + tuple(of.shape)):
        if size == 1 and part.shape[dim] > 1:
            part = part.narrow(dim, 0, 1)
    return part


def values_of(model: nn.Module) -> Mapping[str, Tensor]:
    """The current values of a model's parameters by name. Those that are spread are gathered one at a time.

    Raises:
        ValueError: a parameter is on the meta device.
    """
    reshard(model)
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        if parameter.is_meta:
            raise ValueError(f"the parameter {name!r} is on the meta device, where it has no values: load them first")
        if parameter.layout is not torch.strided:
            raise ValueError(f"the parameter {name!r} is sparse ({parameter.layout}): make it dense first (to_dense())")
    spread = [parameter for parameter in named.values() if is_spread(parameter)]
    if spread:
        return Fetched(list(named), lambda name: whole(named[name]), spread[0].device)
    return {name: parameter.detach() for name, parameter in named.items()}


def reshard(model: nn.Module) -> None:
    """Put the parameters of ``fully_shard`` back where they belong: a forward pass may leave them gathered."""
    kinds = imported("torch.distributed.fsdp", "FSDPModule")
    for module in model.modules() if kinds else ():
        if isinstance(module, kinds):
            module.reshard()  # type: ignore[operator]


def computed_types(model: nn.Module) -> set[torch.dtype]:
    """The types in which ``fully_shard`` lets a model compute, whatever those of its parameters are."""
    kinds = imported("torch.distributed.fsdp", "FSDPModule")
    parts = [module for module in model.modules() if isinstance(module, kinds)] if kinds else []
    policies = [part._get_fsdp_state()._mp_policy for part in parts]  # type: ignore[operator]
    return {policy.param_dtype for policy in policies if policy.param_dtype is not None}


def has_all_values(model: nn.Module) -> bool:
    """Are all values here, in this process?"""
    return not any(tensor.is_meta or is_spread(tensor) for tensor in (*model.parameters(), *model.buffers()))


def stand_in(model: nn.Module, inputs: Any = None, fakes: FakeTensorMode | None = None) -> Any:
    """Replace what has no values here by tensors of the same shape that need none, to capture the model.

    Parameters and buffers that are spread over processes or on the meta device, inputs on the meta device, and no hooks
    of ``torch.distributed``. To be called inside of :func:`dagpath.runtime.state.mode`, which puts everything back.

    Args:
        model: the model.
        inputs: its inputs.
        fakes: where such tensors are made; None for a mode of their own.

    Returns:
        The inputs.
    """
    fakes = fakes or FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Any] = {}

    def fake(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or not (tensor.is_meta or is_spread(tensor)):
            return tensor
        if id(tensor) not in made:
            device = "cpu" if tensor.is_meta else tensor.device
            with fakes:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            made[id(tensor)] = (
                tensor,
                (nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty),
            )
        return made[id(tensor)][1]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                held[name] = fake(tensor)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                function = getattr(hook, "func", hook)
                if str(getattr(function, "__module__", "")).startswith("torch.distributed."):
                    del hooks[key]
    return torch.utils._pytree.tree_map(fake, inputs)


def warn_if_alone(peers: Peers) -> None:
    """Warn where several processes train, and this model is none that they share."""
    dist = torch.distributed
    if not peers.groups and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        warnings.warn(
            f"{dist.get_world_size()} processes train together, but this trace is of a model of one process: give "
            "dagpath.trace the model in DistributedDataParallel, not its .module, or each process may find factors of "
            "its own",
            stacklevel=3,
        )


@dataclass(frozen=True)
class Peers:
    """The processes that hold or train a model together; no groups where there is but one.

    Attributes:
        groups: process groups, one for each dimension of a mesh.
        device: where tensors are that those groups send.
        gather: do the processes gather parameters from each other?
    """

    groups: tuple[Any, ...] = ()
    device: torch.device | str = "cpu"
    gather: bool = False

    @staticmethod
    def of(model: Any) -> Peers:
        """Those that share a model: wrapped in ``DistributedDataParallel``, or with parameters that are spread."""
        if isinstance(model, nn.parallel.DistributedDataParallel):
            return Peers((model.process_group,), next(model.parameters()).device)
        if not isinstance(model, nn.Module):
            return Peers()
        inner = next((part for part in model.modules() if isinstance(part, nn.parallel.DistributedDataParallel)), None)
        if inner is not None:
            return Peers.of(inner)
        reshard(model)
        spread: list[Any] = [parameter for parameter in model.parameters() if is_spread(parameter)]
        meshes = {parameter.device_mesh: None for parameter in spread}
        groups = {mesh.get_group(dim): None for mesh in meshes for dim in range(mesh.ndim)}
        return Peers(tuple(groups), next((mesh.device_type for mesh in meshes), "cpu"), bool(meshes))

    def first(self, numbers: Tensor) -> Tensor:
        """The numbers of the first process, on all."""
        for group in self.groups:
            sent = numbers.to(self.device)
            torch.distributed.broadcast(sent, group=group, group_src=0)
            numbers = sent.to(numbers.device)
        return numbers

    def largest(self, value: float) -> float:
        """The largest value of any process, on all."""
        found = torch.tensor(value, dtype=torch.float64, device=self.device)
        for group in self.groups:
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group)
        return float(found)

    def require_same(self, what: str, given: str) -> None:
        """Raise ValueError in all processes unless they give the same text.

        Args:
            what: what it describes, for the message.
            given: the text.
        """
        digest = float(int.from_bytes(hashlib.sha256(given.encode()).digest()[:6], "big"))
        if self.largest(digest) != -self.largest(-digest):
            raise ValueError(f"{what} differ between the processes that share the model; here: {given}")

    @contextlib.contextmanager
    def together(self, gathers: bool = False) -> Iterator[None]:
        """If the block raises in one process, it raises in all. Nothing in the block may wait for the others.

        Args:
            gathers: the block gathers parameters where they are spread. What fails in one process alone there leaves
                the others waiting for it, until PyTorch's timeout.
        """
        if gathers and self.gather:
            yield
            return
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failure = error
            raise
        finally:
            if self.largest(float(failure is not None)) and failure is None:
                raise BalanceError("another process failed, and says why; nothing was changed here either")
