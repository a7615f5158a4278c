"""Where in a model's source a call stands."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class Site:
    """A place in the model: one call of an operation.

    Attributes:
        operation: name of the ATen operation, for example ``conv2d``; others with their namespace, ``mylib::cut``.
        module: path of the module that made the call, for example ``layer1.0.conv1``.
        source: the line of source code, as ``file:line (code)``.

    Example:
        >>> import torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> [(site.operation, site.module) for site in dagpath.trace(net, torch.zeros(1, 4)).graph.sites]
        [('linear', '0'), ('linear', '2')]
    """

    operation: str
    module: str
    source: str


def site_of(node: fx.Node) -> Site:
    """Where in the model's source the call of a node stands."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    written = node.meta.get("original_aten") or node.target  # what the user called, where that was decomposed
    packet = getattr(written, "overloadpacket", node.target)
    name = getattr(packet, "_qualified_op_name", getattr(packet, "__name__", str(packet)))
    operation = name.removeprefix("aten::") if node.op == "call_function" else node.op
    return Site(operation, stack[-1][0] if stack else "", _source_line(node.meta.get("stack_trace") or ""))


def describe(node: fx.Node) -> str:
    """An operation, its module and its source line, in words."""
    site = site_of(node)
    module = f" in {site.module!r}" if site.module else ""
    source = f" at {site.source}" if site.source else ""
    return f"{site.operation}{module}{source}"


def _source_line(stack_trace: str) -> str:
    """The innermost line outside of torch in a node's stack trace, as ``file:line (code)``."""
    found = ""
    lines = stack_trace.splitlines()
    for line, code in zip(lines, [*lines[1:], ""], strict=False):
        if line.lstrip().startswith("File ") and "/torch/nn/" not in line.replace("\\", "/"):
            file, number = line.split('"')[1], line.split("line ")[1].split(",")[0]
            found = f"{file}:{number} ({code.strip()})"
    return found
