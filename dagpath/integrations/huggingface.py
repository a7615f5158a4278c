"""Re-conditioning in Hugging Face's Trainer. Needs transformers: ``pip install 'dagpath[huggingface]'``."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from dagpath.integrations.rebalancing import Rebalancing

try:
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        "dagpath.integrations.huggingface needs transformers and accelerate: pip install 'dagpath[huggingface]'"
    ) from error


class RebalanceCallback(Rebalancing, TrainerCallback):
    """Balance the model of a ``transformers.Trainer`` after every k-th step of its optimizer.

    A :class:`dagpath.optim.Rebalance` from the start of ``trainer.train`` to its end. The steps are counted from the
    Trainer's ``global_step``, which its checkpoints contain, so that a run that is resumed goes on counting.

    Arguments, attributes and errors: those of :class:`dagpath.integrations.rebalancing.Rebalancing`.

    Example:
        >>> import torch
        >>> from dagpath.integrations.huggingface import RebalanceCallback
        >>> callback = RebalanceCallback((), every=100, kwargs={"pixel_values": torch.zeros(1, 3, 32, 32)})
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The Trainer calls it: balance from here on."""
        optimizer: Optimizer = kwargs["optimizer"]
        if isinstance(optimizer, AcceleratedOptimizer):  # its steps call no hooks: those of the optimizer in it do
            optimizer = optimizer.optimizer
        self.start(kwargs["model"], optimizer, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The Trainer calls it: balance no more."""
        self.stop()
