"""Models whose own ``train`` changes parameters: it may merge a weight in eval mode, and take it apart again."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dagpath.runtime.state import mode, parameters_kept


def changed_by_modes(model: nn.Module, factors: Mapping[str, Tensor]) -> list[str]:
    """Names of the parameters that a change of mode changes, if rescaled ones are changed otherwise.

    A low-rank update that is added to a weight is rescaled as the weight is; a copy of a gain that is kept outside of
    the parameters is not.

    Args:
        model: the model.
        factors: name -> powers of two, which broadcast to the parameter; a rescaling of the model.
    """
    if all(type(module).train is nn.Module.train for module in model.modules()):
        return []
    changed, differ = [], False
    for training in (True, False):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        after = _switched(model, training, {})
        rescaled = _switched(model, training, factors)
        changed += [name for name, value in before.items() if name in after and not torch.equal(after[name], value)]
        differ |= after.keys() != rescaled.keys() or not all(
            torch.allclose(rescaled[name].double(), value.double() * factors.get(name, 1.0), rtol=1e-5, equal_nan=True)
            for name, value in after.items()
        )
    return list(dict.fromkeys(changed)) if differ else []


def _switched(model: nn.Module, training: bool, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters, multiplied by factors, after a change of mode. The model is left as it was."""
    with mode(model, None), parameters_kept(model), torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in factors:
                parameter.data.mul_(factors[name].to(parameter))
        with contextlib.suppress(NotImplementedError):  # an exported program has one mode only
            model.train(training)
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
