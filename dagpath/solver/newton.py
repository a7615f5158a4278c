"""Newton's method with preconditioned conjugate gradients: few steps, each a few passes over the masses."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from dagpath.solver.problem import Point, Problem, Solution, optimality, projected_gradient

_ARMIJO = 1e-4
_POLISH = 10
"""Most steps after the gradient is small enough."""
_ROUNDING = 1e-13
"""Relative rounding error of the objective: a smaller increase is none."""


def solve_newton(problem: Problem, tol: float = 1e-9, max_iter: int | None = None) -> Solution:
    """Minimize by projected Newton steps; each solves its linear system only as exactly as the step deserves.

    Args:
        problem: any :class:`Problem`; its objective is convex, so the minimum is global.
        tol: stop when ``‖∇F‖∞ ≤ tol · scale`` and the Newton step, an estimate of the distance to the minimum, is at
            most ``10 tol``. The gradient alone says little of groups whose masses are tiny beside the others'.
        max_iter: most Newton steps; None for 100.
    """
    start = time.perf_counter()
    point = problem.at(problem.linear.new_zeros(problem.num_groups))
    before, products, iterations = point.value, 0, 0
    inside = problem.matrix.diagonal()
    reached = optimality(point)
    polished = 0
    while iterations < (100 if max_iter is None else max_iter) and polished < _POLISH:
        gradient = projected_gradient(point)
        step, used = _newton_step(point, gradient, inside, forcing=min(0.1, reached**0.5))
        products += used
        if reached <= tol and (not step.numel() or float(step.abs().max()) <= 10 * tol):
            break
        polished += reached <= tol
        following = _line_search(point, gradient, step)
        if following is None:
            break
        point, iterations = following, iterations + 1
        reached = optimality(point)
    return Solution(
        point.z, (before, point.value), reached, iterations, products, reached <= tol, time.perf_counter() - start
    )


def _newton_step(point: Point, gradient: Tensor, inside: Tensor, forcing: float) -> tuple[Tensor, int]:
    """Solve ``H d = −gradient`` on the open coordinates to a relative residual ``forcing``, by Jacobi-CG."""
    if not bool((gradient != 0).any()):
        return torch.zeros_like(gradient), 0
    diagonal = point.hessian_diagonal(inside)
    floor = 1e-12 * float(diagonal.max())
    open_ = (gradient != 0) & (diagonal > 0)
    inverse = torch.where(open_, 1 / diagonal.clamp(min=floor), 0.0)
    step = torch.zeros_like(gradient)
    residual = torch.where(open_, -gradient, 0.0)
    direction = preconditioned = inverse * residual
    energy = float(residual @ preconditioned)
    target = forcing**2 * energy
    products = 0
    while energy > target and products < 10 * len(gradient) + 10:
        image = torch.where(open_, point.hessian_product(direction), 0.0)
        products += 1
        curvature = float(direction @ image)
        if curvature <= 0:
            break
        length = energy / curvature
        step = step + length * direction
        residual = residual - length * image
        preconditioned = inverse * residual
        energy, previous = float(residual @ preconditioned), energy
        direction = preconditioned + energy / previous * direction
    return (step if products and bool(step.any()) else direction), products


def _line_search(point: Point, gradient: Tensor, step: Tensor) -> Point | None:
    """The first point along the step, halving it, that lowers the objective enough; None if there is none."""
    bound = point.problem.bound
    length = 1.0
    for _ in range(60):
        following = point.problem.at((point.z + length * step).clamp(-bound, bound))
        predicted = float(gradient @ (following.z - point.z))
        slack = _ROUNDING * abs(point.value)
        if following.value <= point.value + _ARMIJO * predicted + slack:
            return following
        length /= 2
    return None
