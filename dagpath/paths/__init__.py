"""Explicit paths of small networks."""

from dagpath.paths.lifting import Path, PathLifting

__all__ = ["Path", "PathLifting"]
