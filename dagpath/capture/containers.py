"""Outputs in containers that PyTorch cannot look into."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch.utils import _pytree as pytree


def opened(value: Any) -> Any:
    """``value`` with containers that no pytree is registered for replaced by lists of what they hold.

    These are dataclasses, mappings and sequences of a user's own class. Other objects stay: the exporter refuses them.
    """

    def one(leaf: Any) -> Any:
        parts: list[Any] = []
        if isinstance(leaf, Mapping):
            parts += leaf.values()
        elif isinstance(leaf, (list, tuple)):
            parts += leaf
        elif not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
            return leaf
        if dataclasses.is_dataclass(leaf):
            parts += [getattr(leaf, field.name, None) for field in dataclasses.fields(leaf)]
        return opened(list({id(part): part for part in parts}.values()))  # a field may be an entry too

    return pytree.tree_map(one, value)
