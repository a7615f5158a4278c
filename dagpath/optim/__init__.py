"""Training that knows the rescaling symmetry: steps in path space, and balancing between the steps of an optimizer."""

from dagpath.optim.gsgd import GSGD
from dagpath.optim.path_sgd import PathSGD
from dagpath.optim.rebalance import EquiNormCycle, Rebalance
from dagpath.optimizer_state import register_state

__all__ = ["GSGD", "EquiNormCycle", "PathSGD", "Rebalance", "register_state"]
