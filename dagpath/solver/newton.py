"""Newton's method with conjugate gradients: few steps, each a few passes over the masses."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from dagpath.solver.problem import GroupMatrix, Point, Problem, Solution, optimality, projected_gradient

_ARMIJO = 1e-4
_LONGEST = 3.0
"""Largest change of a coordinate in one step: far from the minimum the quadratic model says little of exponentials."""
_ROUNDING = 1e-13
"""Relative rounding error of the objective: a smaller increase is none."""
_FINEST = 1e-4
"""Smallest relative residual asked of a linear system: what single precision can do, with a margin."""
_POLISH = 10
"""Most steps after the gradient is small enough."""


def solve_newton(problem: Problem, tol: float = 1e-9, max_iter: int | None = None) -> Solution:
    """Minimize by projected Newton steps; each solves its linear system only as exactly as the step deserves.

    Args:
        problem: any :class:`Problem`; its objective is convex, so the minimum is global.
        tol: stop when ``‖∇F‖∞ ≤ tol · scale`` and the distance to the minimum that the last step leaves, as Newton's
            method predicts it, is at most ``10 tol``. The gradient alone says little of groups whose masses are tiny
            beside the others'.
        max_iter: most Newton steps; None for 100.
    """
    start = time.perf_counter()
    point = problem.at(problem.linear.new_zeros(problem.num_groups))
    before, products, iterations, polished = point.value, 0, 0, 0
    system = _System(problem)
    first = reached = optimality(point)
    remaining = float("inf")
    while iterations < (100 if max_iter is None else max_iter) and polished < _POLISH:
        if reached <= tol and remaining <= 10 * tol:
            break
        gradient = projected_gradient(point)
        forcing = max(_FINEST, min(0.3, (reached / first) ** 0.5)) if reached > tol else _FINEST
        step, used = system.newton_step(point, gradient, forcing)
        products += used
        size = float(step.abs().max()) if step.numel() else 0.0
        if reached <= tol and size <= 10 * tol:
            break
        polished += reached <= tol
        following = _descend(point, gradient, step)
        if following is None:
            break
        point, iterations = following, iterations + 1
        reached = optimality(point)
        remaining = size * max(size, forcing)
    return Solution(
        point.z, (before, point.value), reached, iterations, products, reached <= tol, time.perf_counter() - start
    )


class _System:
    """The Newton systems of a problem, scaled to unit diagonal and solved in single precision.

    An inexact Newton step needs no more, and half the bytes are read. The masses are scaled once, by the inverse square
    roots of the degrees at the start, so that they fit the range of single precision whatever theirs is.
    """

    def __init__(self, problem: Problem) -> None:
        ones = problem.linear.new_ones(problem.num_groups + 1)
        degree = problem.matrix.matvec(ones) + problem.matrix.rmatvec(ones)
        self._scale = torch.where(degree > 0, degree.rsqrt(), 1.0)
        self._matrix: GroupMatrix = problem.matrix.scaled(self._scale, self._scale, torch.float32)
        self._twice_inside = 2 * problem.matrix.diagonal()

    def newton_step(self, point: Point, gradient: Tensor, forcing: float) -> tuple[Tensor, int]:
        """Solve ``H d = −gradient`` on the open coordinates to a relative residual; (d, Hessian products used)."""
        outer, kappa = point.problem.outer, point.problem.kappa
        degree = point.rows + point.columns
        diagonal = (degree - self._twice_inside)[1:]
        open_ = (gradient != 0) & (diagonal > 0)
        if not bool(open_.any()):
            return torch.zeros_like(gradient), 0
        root = torch.where(open_, diagonal.clamp(min=1e-290).rsqrt(), 0.0)
        slope = outer.slope(point.total)
        right = -gradient * root / (kappa**2 * slope)
        length = float(right.norm())

        padded = torch.cat([root.new_zeros(1), root])
        into, out_of = ((padded * end / self._scale).float() for end in (point.r, point.c))
        own = (degree * padded**2).float()
        rank_one = torch.cat([root.new_zeros(1), root * point.difference]).float()
        factor = outer.curvature(point.total) / slope

        def product(y: Tensor) -> Tensor:
            image = own * y
            image -= into * self._matrix.matvec(out_of * y)
            image -= out_of * self._matrix.rmatvec(into * y)
            return image.add_(rank_one, alpha=factor * float(rank_one @ y)) if factor else image

        start = torch.cat([right.new_zeros(1), right / length]).float()
        solution, products = _conjugate_gradients(product, start, forcing, most=len(gradient) + 10)
        return root * solution[1:].double() * length, products


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], right: Tensor, forcing: float, most: int
) -> tuple[Tensor, int]:
    """Solve a positive semi-definite system from zero to a relative residual; (solution, products used)."""
    solution = torch.zeros_like(right)
    residual, direction = right.clone(), right.clone()
    energy = float(residual @ residual)
    target = forcing**2 * energy
    products = 0
    while energy > target and products < most:
        image = product(direction)
        products += 1
        curvature = float(direction @ image)
        if curvature <= 0:
            break
        step = energy / curvature
        solution.add_(direction, alpha=step)
        residual.sub_(image, alpha=step)
        energy, previous = float(residual @ residual), energy
        direction.mul_(energy / previous).add_(residual)
    return (solution if bool(solution.any()) else right), products


def _descend(point: Point, gradient: Tensor, step: Tensor) -> Point | None:
    """The next point: along the step with every coordinate limited, or, where that leads up, the whole step shortened.

    Limiting each coordinate by itself lets those with small masses, whose steps are wild far from the minimum, not hold
    back the others.
    """
    shortened = step * min(1.0, _LONGEST / max(float(step.abs().max()), 1e-300))
    following = _line_search(point, gradient, step.clamp(-_LONGEST, _LONGEST))
    if following is None or following.value > point.value - _ROUNDING * abs(point.value):
        other = _line_search(point, gradient, shortened)
        if following is None or (other is not None and other.value < following.value):
            return other
    return following


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
