"""Studies of path conditioning: what it does at initialization, and what it does to training.

Needs scikit-learn, joblib and Pillow for the training comparison, matplotlib for the figures:
``pip install 'dagpath[study]'``.
"""

from dagpath.study.architectures import cnn, mlp
from dagpath.study.initialization import Comparison, InitializationStudy, initialization
from dagpath.study.prediction import Effect, mlp_log_scales, predict
from dagpath.study.runs import Difference, TrainingStudy
from dagpath.study.schemes import SCHEMES, initialize_, second_moments
from dagpath.study.tasks import TASKS, Task
from dagpath.study.training import METHODS, Method, load, train

__all__ = [
    "METHODS",
    "SCHEMES",
    "TASKS",
    "Comparison",
    "Difference",
    "Effect",
    "InitializationStudy",
    "Method",
    "Task",
    "TrainingStudy",
    "cnn",
    "initialization",
    "initialize_",
    "load",
    "mlp",
    "mlp_log_scales",
    "predict",
    "second_moments",
    "train",
]
