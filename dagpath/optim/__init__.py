"""Training that knows the rescaling symmetry: steps in path space, and balancing between the steps of an optimizer."""

from dagpath.apply.optimizer_state import register_state
from dagpath.optim.gsgd import GSGD
from dagpath.optim.path_sgd import PathSGD
from dagpath.optim.rebalance import EquiNormCycle, Rebalance

__all__ = ["GSGD", "EquiNormCycle", "PathSGD", "Rebalance", "register_state"]
