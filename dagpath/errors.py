"""The exceptions of dagpath."""


class DagpathError(Exception):
    """Base class of every error that dagpath raises on purpose, but for bad arguments.

    Those raise ValueError or TypeError, with the value in the message.

    Example:
        >>> import torch, dagpath
        >>> try:
        ...     dagpath.trace(torch.nn.Linear(4, 2), torch.zeros(1, 3))  # three numbers for a layer that takes four
        ... except dagpath.DagpathError as error:
        ...     type(error).__name__
        'CaptureError'
    """


class CaptureError(DagpathError):
    """The model could not be captured as a graph; the message says where and what to do.

    :func:`dagpath.trace` raises it where ``forward`` raises, or where it depends on the values of its input. The model
    is as it was.

    Example:
        >>> import torch, dagpath
        >>> class Signed(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x if x.sum() > 0 else -x
        >>> dagpath.trace(Signed(), torch.zeros(1, 3))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        dagpath.errors.CaptureError: Signed cannot be captured as a graph: ...
    """


class UnsupportedOpError(DagpathError):
    """A path quantity was asked of an operation that has none; the message names it, its module and its source line.

    Norms, counts and Gram matrices never raise it: there an operation that is not positively homogeneous cuts paths.

    Example:
        >>> import torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1))
        >>> lifting = dagpath.PathLifting(dagpath.trace(net, torch.zeros(1, 2)))
        >>> lifting.realize(torch.zeros(1, 2))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        dagpath.errors.UnsupportedOpError: sigmoid in '1'... is not positively homogeneous: it cuts paths, ...
    """


class BalanceError(DagpathError):
    """The balancing problem cannot be posed, or its solution not applied; nothing was changed.

    A weight is not finite, path masses leave float64, or a product leaves the range of a parameter's type.

    Example:
        >>> import torch, dagpath
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> with torch.no_grad():
        ...     _ = net[2].weight[0, 1].fill_(torch.nan)
        >>> dagpath.balance(dagpath.trace(net, torch.zeros(1, 2)))
        Traceback (most recent call last):
        dagpath.errors.BalanceError: parameter '2.weight' has 1 value that is not finite, the first at index (0, 1): \
nan; nothing was changed
    """


class VerificationError(DagpathError):
    """The rescaled model did not reproduce its outputs; its parameters are already restored.

    Attributes:
        difference: the largest difference of an output, relative to the largest entry of that output.
        tolerance: the largest that would have been accepted.

    Example:
        >>> import torch, dagpath
        >>> @torch.library.custom_op("dagpath_example::squared", mutates_args=())
        ... def squared(x: torch.Tensor) -> torch.Tensor:
        ...     return x * x
        >>> _ = squared.register_fake(lambda x: torch.empty_like(x))
        >>> dagpath.register_op(squared, "homogeneous")  # which it is not
        >>> class Net(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b = torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)
        ...     def forward(self, x):
        ...         return self.b(squared(self.a(x)))
        >>> net = Net()
        >>> before = net.a.weight.clone()
        >>> try:
        ...     dagpath.rescale_(net, torch.ones(1, 2))
        ... except dagpath.VerificationError as error:
        ...     error.difference > error.tolerance, torch.equal(net.a.weight, before)
        (True, True)
    """

    def __init__(self, message: str, difference: float, tolerance: float) -> None:
        super().__init__(message)
        self.difference = difference
        self.tolerance = tolerance
