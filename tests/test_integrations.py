"""Balancing inside the training loops of other packages, against the same loop written by hand."""

import sys
from importlib import import_module

import pytest
import torch
from torch import nn

import dagpath
from dagpath.integrations.rebalancing import Rebalancing
from dagpath.optim import Rebalance

from networks import mlp

X = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
Y = X.prod(1, keepdim=True) * torch.tensor([1.0, -1.0])
BATCH, EPOCH, EVERY, STEPS = 8, 3, 2, 6


def network():
    torch.manual_seed(0)
    net = mlp(3, 20, 10, 2)
    with torch.no_grad():
        net[0].weight.mul_(30)  # badly scaled, so that each balancing moves something
    return net


class LightningLoop:
    """``lightning.Trainer`` with SGD or several optimizers."""

    def __init__(self, folder):
        self.lightning = pytest.importorskip("lightning")
        self.callback = import_module("dagpath.integrations.lightning").RebalanceCallback
        self.folder = folder

    def train(self, net, callbacks, steps=STEPS, resume=None, watch=None, split=False):
        class Module(self.lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.automatic_optimization = not split
                self.net = net

            def forward(self, x):
                return self.net(x)

            def training_step(self, batch, _):
                loss = nn.functional.mse_loss(self(batch[0]), batch[1])
                if split:
                    self.manual_backward(loss)
                    for optimizer in self.optimizers():
                        optimizer.step()
                        optimizer.zero_grad()
                return loss

            def configure_optimizers(self):
                parts = [net[0].parameters(), net[2:].parameters()] if split else [net.parameters()]
                made = [torch.optim.SGD(part, lr=1e-3, momentum=0.9) for part in parts]
                if watch is not None:
                    watch(made[-1])
                return made

        trainer = self.lightning.Trainer(
            max_epochs=steps // EPOCH,
            accelerator="cpu",
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
        )
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=BATCH)
        trainer.fit(Module(), data, ckpt_path=resume)
        checkpoint = self.folder / "saved.ckpt"
        trainer.save_checkpoint(checkpoint)
        return checkpoint


class HuggingFaceLoop:
    """``transformers.Trainer``."""

    def __init__(self, folder):
        self.transformers = pytest.importorskip("transformers")
        pytest.importorskip("accelerate")
        self.callback = import_module("dagpath.integrations.huggingface").RebalanceCallback
        self.folder = folder

    def train(self, net, callbacks, steps=STEPS, resume=None, watch=None):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = net

            def forward(self, x, labels=None):
                logits = self.net(x)
                return {"logits": logits} | ({} if labels is None else {"loss": nn.functional.mse_loss(logits, labels)})

        class InOrder(self.transformers.Trainer):
            def _get_train_sampler(self, *_):
                return torch.utils.data.SequentialSampler(self.train_dataset)

        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
        if watch is not None:
            watch(optimizer)
        trainer = InOrder(
            Model(),
            self.transformers.TrainingArguments(
                output_dir=str(self.folder),
                max_steps=steps,
                save_steps=steps,
                per_device_train_batch_size=BATCH,
                max_grad_norm=0,
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
                lr_scheduler_type="constant",
                dataloader_pin_memory=False,
            ),
            train_dataset=[{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)],
            callbacks=callbacks,
            optimizers=(optimizer, None),
        )
        trainer.train(resume_from_checkpoint=resume and str(resume))
        return self.folder / f"checkpoint-{steps}"


@pytest.fixture(params=[LightningLoop, HuggingFaceLoop])
def loop(request, tmp_path):
    return request.param(tmp_path)


def by_hand(steps=STEPS, **options):
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    handle = Rebalance(dagpath.trace(net, X), optimizer, EVERY, **options)
    for step in range(steps):
        batch = slice(step % EPOCH * BATCH, (step % EPOCH + 1) * BATCH)
        x, y = X[batch].clone(), Y[batch].clone()  # in memory of their own, as loaders make them
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
    return net, handle


def assert_same(net, other):
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("submodule", ["", "net"])
def test_training_is_the_loop_by_hand(loop, submodule):
    net = network()
    callback = loop.callback(X[:1], EVERY, "equinorm", submodule=submodule, bound=5.0)
    loop.train(net, [callback])
    expected, handle = by_hand(criterion="equinorm", bound=5.0)
    assert callback.rebalance.steps == handle.steps == STEPS
    assert torch.equal(callback.rebalance.rescaling.log_scales, handle.rescaling.log_scales)
    assert_same(net, expected)


def test_each_kth_step_balances_once_and_powers_of_two_keep_the_outputs_bitwise(loop, monkeypatch):
    net, seen = network(), []
    callback = loop.callback((), EVERY, kwargs={"x": X[:1]}, power_of_two=True)
    apply_ = dagpath.Rescaling.apply_

    def spy(rescaling, *args, **kwargs):
        before = net(X).detach()
        result = apply_(rescaling, *args, **kwargs)
        seen.append((callback.rebalance.steps, torch.equal(net(X), before), bool(rescaling.log_scales.any())))
        return result

    monkeypatch.setattr(dagpath.Rescaling, "apply_", spy)
    loop.train(net, [callback])
    assert [steps for steps, _, _ in seen] == [2, 4, 6]
    assert all(same for _, same, _ in seen)
    assert seen[0][2]


def test_a_resumed_run_goes_on_counting_as_if_it_had_never_stopped(loop):
    checkpoint = loop.train(network(), [loop.callback(X[:1], EVERY)], steps=EPOCH)
    net, callback = network(), loop.callback(X[:1], EVERY)
    loop.train(net, [callback], resume=checkpoint)
    assert callback.rebalance.steps == STEPS
    assert_same(net, by_hand()[0])


def test_no_hook_is_left_in_the_optimizer(loop):
    optimizers, callback = [], loop.callback(X[:1], EVERY)
    net = network()
    loop.train(net, [callback], watch=optimizers.append)
    balanced = callback.rebalance.rescaling
    optimizers[0].step()
    optimizers[0].step()
    assert callback.rebalance.optimizers == tuple(optimizers)
    assert (callback.rebalance.steps, callback.rebalance.rescaling) == (STEPS, balanced)


def test_a_new_start_takes_away_the_hooks_that_an_interrupted_training_left():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    rebalancing = Rebalancing(X[:1], EVERY)
    rebalancing.start(net, optimizer, steps=0)
    interrupted = rebalancing.rebalance
    rebalancing.start(torch.compile(net), optimizer, steps=5)
    nn.functional.mse_loss(net(X), Y).backward()
    optimizer.step()
    assert (interrupted.steps, rebalancing.rebalance.steps) == (0, 6)
    assert (interrupted.rescaling is None, rebalancing.rebalance.rescaling is None) == (True, False)


def test_several_optimizers_in_lightning_are_all_carried_along(tmp_path):
    loop, net = LightningLoop(tmp_path), network()
    callback = loop.callback(X[:1], EVERY)
    loop.train(net, [callback], split=True)
    assert len(callback.rebalance.optimizers) == 2
    assert callback.rebalance.steps == STEPS
    assert_same(net, by_hand()[0])


@pytest.mark.parametrize(("module", "package"), [("lightning", "lightning.pytorch"), ("huggingface", "transformers")])
def test_where_the_package_is_missing_the_error_names_the_extra(module, package, monkeypatch):
    name = f"dagpath.integrations.{module}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{name} needs .*: pip install 'dagpath\[{module}\]'"):
        import_module(name)
