"""The exceptions of dagpath."""


class DagpathError(Exception):
    """Base class of every error that dagpath raises on purpose."""


class CaptureError(DagpathError):
    """The model could not be captured as a graph; the message says where and what to do."""


class UnsupportedOpError(DagpathError):
    """A path quantity was asked of an operation that has none."""


class BalanceError(DagpathError):
    """The balancing problem cannot be posed, for instance because a weight is not finite."""


class VerificationError(DagpathError):
    """The rescaled model did not reproduce its outputs; its parameters are already restored.

    Attributes:
        difference: the measured relative difference of the outputs.
        tolerance: the largest difference that would have been accepted.
    """

    def __init__(self, message: str, difference: float, tolerance: float) -> None:
        super().__init__(message)
        self.difference = difference
        self.tolerance = tolerance
