"""Stochastic gradient descent, each element scaled by the paths through it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dagpath.apply.optimizer_state import register_state
from dagpath.lifting.gram import visit_gram_diagonal
from dagpath.optim.groups import check_rates, check_state, check_steps, evaluate, inverse_of, parameter_groups
from dagpath.passes.values import ldexp_
from dagpath.runtime.state import plain_computation
from dagpath.trace import TracedModel, require_traced


class PathSGD(Optimizer):
    """Path-SGD: ``θ_e ← θ_e − lr · (∂L/∂θ_e) / G_ee``, with G the path Gram matrix.

    ``G_ee = Σ_{p ∋ e} (Φ_p / θ_e)²`` is the squared path-norm through e (:func:`dagpath.gram_diagonal`): the step is
    the steepest descent with respect to the path-norm, element by element. Under a rescaling ``G_ee`` is divided by the
    square of the element's factor and the gradient by the factor, so the step is multiplied by it: two networks that
    differ by a rescaling have the same function after any number of steps.

    Where G is zero (no path of nonzero value meets the element, as before a layer of zeros) the element waits.

    Args:
        traced: the traced model. All of its parameters are optimized: those that are edges between neurons as above,
            the others (the slope of a PReLU) by ordinary SGD, in a parameter group of their own. Frozen ones stay.
            A parameter on no path of the model in eval mode (a head that is used in training only) has no G and takes
            steps of ordinary SGD too; those do depend on a rescaling.
        lr: the learning rate, positive or zero; in units of squared path values, not those of SGD.
        every: G is computed anew every so many steps, at the parameters' values then.

    Raises:
        TypeError: ``traced`` is no traced model, or ``every`` no number of steps.
        ValueError: an option is out of range.
        RuntimeError: a gradient is sparse.

    Cost: SGD's, and every ``every`` steps one forward and one backward pass in float64 at batch 1; one more tensor of
    each parameter's size. Source: Neyshabur, Salakhutdinov, Srebro, NeurIPS 2015.

    Example:
        >>> import torch, dagpath
        >>> from dagpath.optim import PathSGD
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = PathSGD(dagpath.trace(net, torch.zeros(1, 4)), lr=0.01, every=10)
        >>> net(torch.randn(16, 4)).square().mean().backward()
        >>> _ = optimizer.step()
    """

    def __init__(self, traced: TracedModel, lr: float, every: int = 1) -> None:
        require_traced(traced)
        check_rates(lr)
        check_steps("every", every)
        super().__init__(parameter_groups(traced), {"lr": lr, "paths": False, "steps": 0})
        self._traced = traced
        self._every = every

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: evaluates the model and returns the loss, with its gradients computed.

        Returns:
            What the closure returned; None without one.
        """
        loss = evaluate(self, closure)
        for group in self.param_groups:
            if group["paths"] and group["steps"] % self._every == 0:
                self._measure()
            group["steps"] += 1
            lr = float(group["lr"])
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state.get(parameter)
                if state:
                    rate = math.ldexp(lr, state["exponent"])
                    parameter.addcmul_(parameter.grad, state["inverse_gram"], value=-rate)
                else:
                    parameter.sub_(parameter.grad, alpha=lr)
        return loss

    @plain_computation()
    def _measure(self) -> None:
        """``1 / G_ee`` of all elements, zero where G is; nothing for parameters that no path meets.

        It is kept as ``inverse_gram · 2**exponent``, with at most 1 in front: in deep networks G leaves float32.
        """
        found: dict[str, tuple[Tensor, int]] = {}

        def visit(name: str, gram: Tensor, exponent: int) -> None:
            found[name] = gram, exponent

        with torch.enable_grad():
            whole = visit_gram_diagonal(self._traced, visit)
        held = {parameter for group in self.param_groups if group["paths"] for parameter in group["params"]}
        for name, parameter in self._traced.model.named_parameters():
            if parameter in held and name in found:
                gram, exponent = found[name]
                inverse = inverse_of(gram)
                own = math.frexp(float(inverse.max()))[1]
                inverse = ldexp_(inverse, -own).to(parameter.dtype)
                self.state[parameter].update(inverse_gram=inverse, exponent=own - exponent - whole)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a PathSGD holds the trace of its model, which cannot be copied or pickled: make another from a trace of "
            "the model's copy, and give it this one's state_dict()"
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of another PathSGD of the same architecture.

        Raises:
            ValueError: it is the state of something else, or a damaged one. Nothing is changed.
        """
        check_state(self, state_dict, {"inverse_gram": Tensor, "exponent": int})
        for number, entries in state_dict["state"].items():
            if entries and len(entries) != 2:
                raise ValueError(f"the state of parameter {number!r} lacks one of 'inverse_gram' and 'exponent'")
        super().load_state_dict(state_dict)


register_state(PathSGD, {"inverse_gram": 2})
