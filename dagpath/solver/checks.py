"""What the solver refuses: each check raises an error that says what was wrong, where, and the value."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def check_bound(bound: float | NDArray[np.float64], num_groups: int | None = None) -> None:
    """A ValueError for a bound, or bounds group by group, that are not positive."""
    if isinstance(bound, np.ndarray) and bound.shape != (num_groups,):
        raise ValueError(f"bounds must have shape ({num_groups},), one for each group, got {bound.shape}")
    if not np.all(bound > 0):
        raise ValueError(f"bound must be positive, got {np.min(bound)}")


def check_limits(tol: float, max_iter: int | None) -> None:
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}")
    if max_iter is not None and (max_iter < 0 or max_iter % 1 != 0):
        raise ValueError(f"max_iter must be an integer of at least 0, or None, got {max_iter!r}")


def checked_z(z: NDArray[np.float64] | Tensor, num_groups: int, largest: float) -> NDArray[np.float64]:
    """z on the host in double precision; a ValueError if it has another shape or a value beyond ``±largest``."""
    found: NDArray[np.float64] = torch.as_tensor(z, dtype=torch.float64).detach().cpu().numpy()
    if found.shape != (num_groups,):
        raise ValueError(f"z must have shape ({num_groups},), one for each group, got {found.shape}")
    beyond = np.flatnonzero(~(np.abs(found) <= largest))
    if len(beyond):
        raise ValueError(f"|z| must be at most {largest:g} everywhere, got {found[beyond[0]]} at index {beyond[0]}")
    return found


def checked_masses(name: str, masses: Tensor) -> Tensor:
    """Masses in double precision, without their history; a ValueError that begins with the name if they are none."""
    if masses.is_complex():
        raise ValueError(f"{name}masses must be real, got {masses.dtype}")
    masses = masses.detach().double()
    if masses.numel() and not (bool(masses.min() >= 0) and bool(torch.isfinite(masses.sum()))):
        bad = (~((masses >= 0) & torch.isfinite(masses))).nonzero()
        found = f"{float(masses[tuple(bad[0])])} at index {tuple(bad[0].tolist())}" if len(bad) else "inf as their sum"
        raise ValueError(f"{name}masses must be finite and at least 0, and so must their sum; got {found}")
    return masses


def checked_groups(name: str, groups: Tensor, size: int) -> Tensor:
    """Groups as int64; a ValueError that begins with the name if they are not integers from 0 to size − 1."""
    if not groups.numel():
        return groups.long()
    if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
        raise ValueError(f"{name} groups must be integers, got {groups.dtype}")
    low, high = int(groups.min()), int(groups.max())
    if low < 0 or high >= size:
        raise ValueError(f"{name} groups must lie between 0 and {size - 1}; these are from {low} to {high}")
    return groups.long()
