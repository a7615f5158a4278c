"""Training with and without path conditioning: many runs, each kept as a line of a file."""

from __future__ import annotations

import json
import math
import numbers
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from tqdm.auto import tqdm

from dagpath.balance import balance
from dagpath.errors import BalanceError
from dagpath.optim import GSGD, EquiNormCycle
from dagpath.study.runs import FACTS, TrainingStudy
from dagpath.study.tasks import TASKS, Task
from dagpath.trace import trace

Method = Callable[[nn.Module, Tensor, float], tuple[nn.Module, Optimizer]]
"""A way to train, as a function from a fresh network, an example input and a learning rate to what is trained, and its
optimizer."""


def _baseline(model: nn.Module, x: Tensor, lr: float) -> tuple[nn.Module, Optimizer]:
    return model, SGD(model.parameters(), lr)


def _path_conditioning(model: nn.Module, x: Tensor, lr: float) -> tuple[nn.Module, Optimizer]:
    return _baseline(balance(trace(model, x)).apply_(), x, lr)


def _ten_sweeps(model: nn.Module, x: Tensor, lr: float) -> tuple[nn.Module, Optimizer]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ten sweeps stop short of the optimum, which is the point
        rescaling = balance(trace(model, x), solver="coordinate", max_iter=10)
    return _baseline(rescaling.apply_(), x, lr)


def _enorm(model: nn.Module, x: Tensor, lr: float) -> tuple[nn.Module, Optimizer]:
    optimizer = SGD(model.parameters(), lr)
    EquiNormCycle(trace(model, x), optimizer)
    return model, optimizer


def _batch_norm(model: nn.Module, x: Tensor, lr: float) -> tuple[nn.Module, Optimizer]:
    """A batch norm before every ReLU."""
    if type(model) is not nn.Sequential or not any(isinstance(layer, nn.ReLU) for layer in model):
        raise ValueError(
            'the method "batch norm" puts its layers before the nn.ReLU modules of a flat nn.Sequential, got a '
            f"{type(model).__name__} without them; give a method of your own that builds the normalized network"
        )
    layers: list[nn.Module] = []
    for layer in model:
        if isinstance(layer, nn.ReLU):
            images, width = isinstance(layers[-1], nn.Conv2d), next(layers[-1].parameters()).shape[0]
            layers.append(nn.BatchNorm2d(width) if images else nn.BatchNorm1d(width))
        layers.append(layer)
    return _baseline(nn.Sequential(*layers), x, lr)


def _gsgd(model: nn.Module, x: Tensor, lr: float) -> tuple[nn.Module, Optimizer]:
    return model, GSGD(trace(model, x), lr, skeleton="ones")


METHODS: dict[str, Method] = {
    "baseline": _baseline,
    "path conditioning": _path_conditioning,
    "ten sweeps": _ten_sweeps,
    "ENorm": _enorm,
    "batch norm": _batch_norm,
    "G-SGD": _gsgd,
}
"""Name of a method -> what it does to a network before and during training. They are SGD on the network as it is
initialized; after path conditioning to the optimum, and after ten coordinate sweeps toward it; with a cycle of ENorm
after every step; with a batch norm before every ReLU; and G-SGD with a skeleton of ones."""

_BEGINNING = b'{"task": '
"""Of every line."""


def train(
    path: str | os.PathLike[str],
    tasks: Iterable[str] | Mapping[str, Task] = TASKS,
    methods: Iterable[str] | Mapping[str, Method] = METHODS,
    learning_rates: Iterable[float] | Mapping[str, Iterable[float]] = (0.01, 0.05, 0.2),
    seeds: int | Iterable[int] = 5,
    epochs: int = 30,
    batch_size: int = 64,
    n_jobs: int = -1,
    progress: bool = True,
) -> TrainingStudy:
    """Train each network with each method, learning rate and seed, and keep every run as a line of a file.

    Runs with the same seed start from the same parameters and see the same batches. A run that the file already has is
    not repeated, so a study that was interrupted goes on where it was, and one that is widened runs only what is new.
    The file knows tasks and methods by name alone: one that was changed needs another name, or another file.
    Each line is a JSON object: what was run, the training loss over all data before the first epoch and after each, the
    seconds it took, and the versions. A run that diverges ends there: the losses that it never had are null, and
    ``error`` says what happened.

    Args:
        path: the file; made if there is none, in a folder that exists. A last line that an interruption
            cut short is dropped.
        tasks: names from ``TASKS``, or a mapping of names to :class:`Task`.
        methods: names from ``METHODS``, or a mapping of names to functions ``(model, example input, learning rate) ->
            (model, optimizer)``.
        learning_rates: for all tasks, or a mapping of each task's name to its own.
        seeds: which, or how many.
        epochs, batch_size: of every run.
        n_jobs: processes, each with one thread; -1 for one per core. 1 runs in this process.
        progress: show a progress bar, with an estimate of the time left.

    Returns:
        The runs that were asked for, as a :class:`TrainingStudy`.

    Raises:
        ValueError: nothing to run, an unknown task or method, a task without learning rates, a number out of range, a
            line of the file that is no run, or "batch norm" on a network that is no flat sequence of modules.
        FileNotFoundError: the folder of the path does not exist.

    Needs scikit-learn, joblib and Pillow: ``pip install 'dagpath[study]'``.

    Cost: a training for each run that the file lacks, each in one process with one thread.

    Example:
        >>> import pathlib, tempfile
        >>> from dagpath import study
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = study.train(pathlib.Path(folder) / "runs.jsonl", ["autoencoder"], ["baseline"], [0.1], seeds=1,
        ...                         epochs=2, n_jobs=1, progress=False)
        >>> len(found.runs), len(found.runs[0]["losses"])
        (1, 3)
    """
    from joblib import Parallel, delayed

    tasks, methods = _chosen("task", tasks, TASKS), _chosen("method", methods, METHODS)
    epochs, batch_size = _whole("epochs", epochs, 1), _whole("batch_size", batch_size, 1)
    chosen = range(_whole("seeds", seeds, 1)) if not isinstance(seeds, Iterable) else seeds
    seeds = [_whole("every seed", seed, 0) for seed in chosen]
    if not isinstance(learning_rates, Mapping):
        shared = list(learning_rates)
        learning_rates = dict.fromkeys(tasks, shared)
    lacking = [task for task in tasks if task not in learning_rates]
    if lacking:
        raise ValueError(f"learning_rates has none for the task {lacking[0]!r}")
    rates = {task: list(learning_rates[task]) for task in tasks}
    if not (tasks and methods and seeds and all(rates.values())):
        raise ValueError("there is nothing to run: tasks, methods, learning_rates and seeds must not be empty")
    bad = [lr for group in rates.values() for lr in group if not 0 < lr < math.inf]
    if bad:
        raise ValueError(f"learning rates must be positive and finite, got {bad[0]}")
    facts_of_runs: list[dict[str, Any]] = [
        dict(zip(FACTS, (task, method, float(lr), seed, epochs, batch_size), strict=True))
        for task in tasks
        for lr in rates[task]
        for seed in seeds
        for method in methods
    ]
    wanted = {_key(facts): facts for facts in facts_of_runs}
    found, size = _runs(Path(path))
    done = {_key(run): run for run in found}
    missing = [facts for key, facts in wanted.items() if key not in done]
    jobs = [delayed(_run)(facts, tasks[facts["task"]], methods[facts["method"]]) for facts in missing]
    parallel = Parallel(n_jobs=n_jobs, return_as="generator_unordered")
    with Path(path).open("a", encoding="utf-8") as file:
        file.truncate(size)
        results = parallel(jobs)
        for run in tqdm(results, "runs", len(wanted), initial=len(wanted) - len(missing), disable=not progress):
            file.write(json.dumps(run) + "\n")
            file.flush()
            done[_key(run)] = run
    return TrainingStudy([done[key] for key in wanted])


def load(path: str | os.PathLike[str]) -> TrainingStudy:
    """All runs of a file that :func:`dagpath.study.train` wrote.

    They are in the order of tasks, learning rates, seeds and methods. Tasks and methods of one's own follow those of
    ``TASKS`` and ``METHODS``, by name.

    Args:
        path: the file.

    Returns:
        A :class:`TrainingStudy`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line of it is no run.

    Example:
        >>> import tempfile
        >>> from dagpath import study
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = f"{folder}/runs.jsonl"
        ...     trained = study.train(path, ["autoencoder"], ["baseline"], [0.1], 1, epochs=1, n_jobs=1, progress=False)
        ...     study.load(path).runs == trained.runs
        True
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no file of runs at {Path(path)}")
    tasks, methods = list(TASKS), list(METHODS)

    def place(run: Mapping[str, Any]) -> tuple[Any, ...]:
        task, method = (
            (names.index(name), "") if name in names else (len(names), name)
            for names, name in ((tasks, run["task"]), (methods, run["method"]))
        )
        return task, run["lr"], run["seed"], method

    return TrainingStudy(sorted(_runs(Path(path))[0], key=place))


def _chosen(kind: str, names: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(names, Mapping):
        return dict(names)
    if isinstance(names, str):
        raise ValueError(f"give the {kind}s as a list, got {names!r}")
    chosen = list(names)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise ValueError(f"there is no {kind} {unknown[0]!r}; there are {', '.join(map(repr, known))}")
    return {name: known[name] for name in chosen}


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)


def _key(run: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(run[fact] for fact in FACTS)


def _runs(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The runs of a file, each once, and the length of its whole lines: what follows them is an interrupted write."""
    content = path.read_bytes() if path.exists() else b""
    size = content.rfind(b"\n") + 1
    runs: dict[tuple[Any, ...], dict[str, Any]] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        cut = number > content.count(b"\n")
        try:
            if cut and line[: len(_BEGINNING)] == _BEGINNING[: len(line)]:
                break
            run = json.loads(line)
            runs.setdefault(_key(run), run)  # two studies that wrote to it at the same time may both have it
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: this is no run of a study: {line[:80]!r}") from error
    return list(runs.values()), size


def _run(facts: dict[str, Any], task: Task, method: Method) -> dict[str, Any]:
    """One training, in a process of its own or in this one."""
    import dagpath

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            start = time.perf_counter()
            losses, error = _losses(task, method, **{name: facts[name] for name in FACTS[2:]})
            seconds = time.perf_counter() - start
    finally:
        torch.set_num_threads(threads)
    versions = {"dagpath": dagpath.__version__, "torch": torch.__version__}
    return {**facts, "losses": losses, "error": error, "seconds": round(seconds, 2), "versions": versions}


def _losses(
    task: Task, method: Method, lr: float, seed: int, epochs: int, batch_size: int
) -> tuple[list[float | None], str | None]:
    """The training loss over all data before the first epoch and after each, None once it diverged, and how."""
    inputs, targets = task.data()
    torch.manual_seed(seed)
    model, optimizer = method(task.build(), inputs[:1], lr)
    batches = torch.Generator().manual_seed(seed)
    losses: list[float | None] = []
    error = None
    while len(losses) <= epochs and error is None:
        try:
            if losses:
                model.train()
                for batch in torch.split(torch.randperm(len(inputs), generator=batches), batch_size):
                    optimizer.zero_grad()
                    torch.autograd.backward(task.loss(model(inputs[batch]), targets[batch]))
                    optimizer.step()
        except BalanceError as raised:  # gradients on their way to infinity cannot be rescaled
            error = str(raised)
            break
        model.eval()
        with torch.no_grad():
            loss = float(task.loss(model(inputs), targets))
        if math.isfinite(loss):
            losses.append(float(f"{loss:.5g}"))
        else:
            error = f"the loss is {loss}"
    return [*losses, *[None] * (epochs + 1 - len(losses))], error
