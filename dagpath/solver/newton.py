"""Newton's method, on a separable model of the problem first, then with conjugate gradients that it preconditions."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from dagpath.solver.checks import check_limits
from dagpath.solver.matrix import Array
from dagpath.solver.preconditioner import LONGEST, SeparableHessian
from dagpath.solver.problem import Point, Problem, Solution

_ARMIJO = 1e-4
_ROUNDING = 1e-13
"""Relative rounding error of the objective: a smaller increase is none."""
_PAYS = 0.1
"""The separable model is solved again as long as each solution brings the gradient down by this factor."""
_FINEST = {torch.float32: 1e-4, torch.float64: 1e-10}
"""Smallest relative residual asked of a linear system: what each precision can do, with a margin."""
_STRETCH = 8.0
"""How far a coordinate may move before the single-precision masses are scaled anew."""
_SAME = 1e-3
"""How far coordinates may move before a new Hessian is needed to tell how far the minimum is."""
_MODEL_STEPS = 100
"""Most Newton steps on the separable model."""
_PATIENCE = 15
"""Steps after which the masses are taken to span too much."""
_COOL = 5.0
"""Logarithm of the span of masses that Newton's method takes in its stride."""
_WARM = 1e-3
"""Tolerance of the minima on the way."""
_POLISH = 10
"""Most steps after the gradient is small enough."""


def solve_newton(problem: Problem, tol: float = 1e-9, max_iter: int | None = None) -> Solution:
    """Minimize by projected Newton steps.

    First steps minimize the separable model, in which every block of masses is replaced by the rank-one matrix of the
    same row and column sums: that costs little, and goes on as long as it pays. Where every block's masses are a
    product of what arrives and what leaves, as for linear layers, one is all. Then come Newton steps on the problem
    itself, whose linear systems are solved by conjugate gradients with the model's Hessian as preconditioner, only as
    exactly as the step deserves.

    Args:
        problem: any :class:`Problem`; its objective is convex, so the minimum is global.
        tol: stop when ``‖∇F‖∞ ≤ tol · scale`` and the distance to the minimum, as the model's Hessian predicts it, is
            at most ``10 tol``. The gradient alone says little of groups whose masses are tiny beside the others', but
            ``converged`` speaks of it alone: in directions that no mass holds the distance has no meaning.
        max_iter: most steps; None for 200.

    Returns:
        A :class:`Solution`, also where it stopped short of the tolerance.

    Raises:
        ValueError: tol is not positive, or max_iter no integer of at least 0.

    Cost: two products with the masses for every point that is tried and for every Hessian product. Steps on the
    separable model cost a few operations per group.

    Example:
        >>> import torch, dagpath
        >>> from dagpath.solver import Problem, solve_newton
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> traced = dagpath.trace(net, torch.zeros(1, 4))
        >>> masses = torch.cat([values.reshape(-1) for values in dagpath.gram_diagonal(traced).values()])
        >>> solution = solve_newton(Problem.from_incidence(traced.graph.incidence(), masses))
        >>> torch.allclose(solution.z, dagpath.balance(traced).log_scales)
        True
    """
    check_limits(tol, max_iter)
    began = time.perf_counter()
    with np.errstate(all="ignore"):
        first = problem.at(np.zeros(problem.num_groups))
        most = 200 if max_iter is None else max_iter
        start = first.without_idle()
        run = _minimize(start, tol, min(most, _PATIENCE), torch.float32)
        if not run.finished:
            run = _anneal(run, start, tol, most)
    return Solution(
        torch.from_numpy(run.point.z),
        (first.value, run.point.value),
        run.point.optimality,
        run.iterations,
        run.products,
        run.point.optimality <= tol,
        time.perf_counter() - began,
        torch.from_numpy(run.point.held),
    )


@dataclass
class _Run:
    """How far a minimization came, and the model's Hessian at a point that may be this one or very near.

    It is finished if both the gradient and the predicted distance of the minimum are small enough.
    """

    point: Point
    iterations: int = 0
    products: int = 0
    nearby: SeparableHessian | None = None
    finished: bool = False

    def hessian(self) -> SeparableHessian:
        """The model's Hessian at the point."""
        if self.nearby is None or self.nearby.point is not self.point:
            self.nearby = SeparableHessian(self.point)
        return self.nearby

    def distance(self) -> float:
        """How far the minimum is from the point, by the model's Hessian there or very near."""
        near = self.nearby
        if near is None or _largest(self.point.z - near.point.z) > _SAME:
            near = self.hessian()
        return _largest(near.solve(-self.point.projected_gradient))


def _anneal(run: _Run, start: Point, tol: float, most: int) -> _Run:
    """Minimize with the masses to a small power first, ``a^τ``, and from there with τ doubled until it is one.

    For masses that span many orders of magnitude. With small τ the problem is nearly least squares for their
    logarithms; with large τ the minimum grows in proportion to τ, and a minimum scaled so is close to the next.
    """
    problem = start.problem
    power = min(1.0, _COOL / max(problem.matrix.log_spread, 1e-300))
    z = power * start.z
    while power < 1.0 and run.iterations < most:
        tempered = replace(problem, matrix=problem.matrix.tempered(power), bound=power * problem.bound)
        found = _minimize(tempered.at(z), _WARM, most - run.iterations, torch.float64)
        z, power, previous = found.point.z, min(1.0, 2 * power), power
        z = z * (power / previous)
        run = _Run(run.point, run.iterations + found.iterations, run.products + found.products)
    found = _minimize(problem.at(z.clip(-problem.bound, problem.bound)), tol, most - run.iterations, torch.float64)
    ends = found.point, run.point
    better = found.point if found.finished else min(ends, key=lambda end: (end.optimality > tol, end.value))
    return _Run(better, run.iterations + found.iterations, run.products + found.products)


def _minimize(start: Point, tol: float, most: int, precision: torch.dtype) -> _Run:
    run = _Run(start)
    model_pays = not start.matrix.is_separable
    system: NewtonSystem | None = None
    best: Point | None = None
    polished = 0
    while run.iterations < most and polished < _POLISH:
        point, small = run.point, run.point.optimality <= tol
        if small:
            if not best or point.optimality < best.optimality:
                best = point
            if run.distance() <= 10 * tol:
                run.finished = True
                break
            polished += 1
        following = None
        if model_pays:
            following, run.nearby = _model_step(point, tol)
            model_pays = following is not None and following.optimality <= _PAYS * point.optimality
        if following is None:
            hessian = run.hessian()
            if hessian.exact:
                step = hessian.solve(-point.gradient)
            else:
                if system is None or not system.serves(point):
                    system = NewtonSystem(point, precision)
                forcing = _FINEST[precision]
                if precision == torch.float32 and not small:
                    forcing = max(forcing, min(0.3, (point.optimality / start.optimality) ** 0.5))
                step, products = system.solve(hessian, -point.gradient, forcing)
                run.products += products
            following = _descend(point, step + hessian.held)
        if following is None:
            break
        run.point, run.iterations = following, run.iterations + 1
    if best and not run.finished:
        run.point = best
    return run


def _model_step(point: Point, tol: float) -> tuple[Point | None, SeparableHessian | None]:
    """Toward the minimum of the separable model at a point, None if the objective rises; the last Hessian there."""
    run = _minimize(point.separable(), max(0.01 * tol, 1e-3 * point.optimality), _MODEL_STEPS, torch.float64)
    return _line_search(point, run.point.z - point.z), run.nearby


class NewtonSystem:
    """The Newton systems of a problem near one point: products with their matrix in single precision.

    An inexact Newton step needs no more, and half the bytes are read. The masses are scaled by the inverse square roots
    of the degrees at that point, so that they fit the range of single precision whatever theirs is.
    """

    def __init__(self, point: Point, precision: torch.dtype) -> None:
        degree = point.rows + point.columns
        scale = np.where(degree > 0, degree, 1.0) ** -0.5
        self._z, self._rows, self._columns = point.z, point.r * scale, point.c * scale
        self._matrix = point.matrix.scaled(self._rows, self._columns, precision)

    def serves(self, point: Point) -> bool:
        return _largest(point.z - self._z) <= _STRETCH

    def product(self, model: SeparableHessian) -> Callable[[Array], Array]:
        """The product with the Hessian, scaled as the model's is; vectors are [num_groups + 1]."""
        point, scale, layout = model.point, model.scale, self._matrix.layout
        degree = (point.rows + point.columns + model.damping) * scale**2
        into, out_of = scale * point.r / self._rows, scale * point.c / self._columns
        m = scale * np.concatenate([[0.0], point.difference])

        def multiply(y: Array) -> Array:
            rows, columns = self._matrix.products(into * y, out_of * y)
            image: Array = degree * y + (model.factor * float(m @ y)) * m
            image -= into * np.bincount(layout.rows.groups, rows, len(y))
            image -= out_of * np.bincount(layout.columns.groups, columns, len(y))
            return image

        return multiply

    def solve(self, model: SeparableHessian, right: Array, forcing: float) -> tuple[Array, int]:
        """Solve ``H d = right`` on the groups that take part to a relative residual; (d, Hessian products used)."""
        scaled = model.scale * np.concatenate([[0.0], right])
        size = float(np.linalg.norm(scaled))
        if size == 0:
            return np.zeros_like(right), 0
        product, most = self.product(model), len(scaled) + 10
        solution, products = _conjugate_gradients(product, model.precondition, scaled / size, forcing, most)
        return model.unscaled(size * solution), products


def _conjugate_gradients(
    product: Callable[[Array], Array], precondition: Callable[[Array], Array], right: Array, forcing: float, most: int
) -> tuple[Array, int]:
    """Solve a positive semi-definite system from zero to a relative preconditioned residual; (solution, products)."""
    solution, residual = np.zeros_like(right), right.copy()
    direction = precondition(residual)
    energy = float(residual @ direction)
    target = forcing**2 * energy
    products = 0
    while energy > target and products < most:
        image = product(direction)
        products += 1
        curvature = float(direction @ image)
        if not curvature > 0:
            break
        step = energy / curvature
        solution += step * direction
        residual -= step * image
        conditioned = precondition(residual)
        energy, previous = float(residual @ conditioned), energy
        direction = conditioned + (energy / previous) * direction
    return (solution if products > 1 or solution.any() else right), products


def _largest(values: Array) -> float:
    return float(np.abs(values).max()) if len(values) else 0.0


def _descend(point: Point, step: Array) -> Point | None:
    """The next point: along the step with every coordinate limited, or, where that leads up, the whole step shortened.

    Limiting each coordinate by itself lets those with small masses, whose steps are wild far from the minimum, not hold
    back the others.
    """
    following = _line_search(point, step.clip(-LONGEST, LONGEST))
    if following is None or following.value > point.value - _ROUNDING * abs(point.value):
        other = _line_search(point, step * min(1.0, LONGEST / max(_largest(step), 1e-300)))
        if following is None or (other is not None and other.value < following.value):
            return other
    return following


def _line_search(point: Point, step: Array) -> Point | None:
    """The first point along the step, halving it, that lowers the objective enough; None if there is none."""
    bound = point.problem.bound
    length = 1.0
    slack = _ROUNDING * abs(point.value)
    for _ in range(60):
        following = point.at((point.z + length * step).clip(-bound, bound))
        predicted = float(point.projected_gradient @ (following.z - point.z))
        if following.value <= point.value + _ARMIJO * predicted + slack:
            return following
        length /= 2
    return None
