"""Re-conditioning in PyTorch Lightning. Needs Lightning: ``pip install 'dagpath[lightning]'``."""

from __future__ import annotations

from typing import Any

from dagpath.integrations.rebalancing import Rebalancing

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("dagpath.integrations.lightning needs Lightning: pip install 'dagpath[lightning]'") from error


class RebalanceCallback(Rebalancing, Callback):
    """Balance a LightningModule after every k-th step of its optimizer.

    A :class:`dagpath.optim.Rebalance` from the start of ``trainer.fit`` to its end. Checkpoints contain the number of
    steps, so that a run that is resumed with ``ckpt_path`` goes on counting. Of several optimizers, the steps of the
    last one count.

    Arguments, attributes and errors: those of :class:`dagpath.integrations.rebalancing.Rebalancing`.

    Example:
        >>> import torch
        >>> from dagpath.integrations.lightning import RebalanceCallback
        >>> callback = RebalanceCallback(torch.zeros(1, 64), every=100, submodule="backbone")
    """

    _loaded_steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning calls it: balance from here on."""
        self.start(pl_module, trainer.optimizers, self._loaded_steps)
        self._loaded_steps = 0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning calls it: balance no more."""
        self.stop()

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, which Lightning puts into checkpoints."""
        return {"steps": self._loaded_steps} if self.rebalance is None else self.rebalance.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the number of steps over from a checkpoint."""
        self._loaded_steps = state_dict["steps"]
