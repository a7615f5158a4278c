"""Models that several processes train together: each multiplies what it holds, by the same factors bit for bit."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import dagpath

from invariance import rescale_alike_
from networks import Net, mlp


def residual_network() -> nn.Module:
    """Widths that two and four processes do not share evenly, a skip, batch norm, groups, and biases."""
    torch.manual_seed(0)
    return Net(
        lambda m, x: m.head(
            (lambda y: y + m.norm(m.grouped(torch.relu(m.inner(y)))))(torch.relu(m.stem(x))).relu().mean((2, 3))
        ),
        stem=nn.Conv2d(2, 6, 3),
        inner=nn.Conv2d(6, 10, 1),
        grouped=nn.Conv2d(10, 6, 1, groups=2),
        norm=nn.BatchNorm2d(6),
        head=nn.Linear(6, 3),
    )


def whole(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): whole(p).clone() for name, p in model.named_parameters()}


def assert_same(model: nn.Module, other: nn.Module) -> None:
    expected = values(other)
    for name, value in values(model).items():
        assert torch.equal(value, expected[name]), name


def assert_same_everywhere(tensor: Tensor) -> None:
    found = [torch.zeros_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor)
    assert all(torch.equal(part, tensor) for part in found)


def sharded(model: nn.Module, **options) -> nn.Module:
    """Every layer and the rest in a group of its own."""
    for layer in list(model.children()):
        if list(layer.parameters()):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def images(count: int = 4) -> Tensor:
    """Other ones in every process."""
    return torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(dist.get_rank()))


def a_replicated_model_is_rescaled_alike() -> None:
    plain = residual_network()
    model = DistributedDataParallel(copy.deepcopy(plain))
    rescaling = dagpath.rescale_(model, images())
    assert_same_everywhere(rescaling.log_scales)
    rescale_alike_(plain, images(), rescaling)
    assert_same(model, plain)
    model(images()).sum().backward()  # its hooks still find their parameters


def a_sharded_model_is_rescaled_where_it_lies() -> None:
    plain = residual_network()
    model = sharded(copy.deepcopy(plain))
    model.eval()
    before = model(images())  # which leaves a part of it gathered
    rescaling = dagpath.rescale_(model, images())
    assert_same_everywhere(rescaling.log_scales)
    rescale_alike_(plain, images(), rescaling)
    assert_same(model, plain)
    assert rescaling.difference < 1e-5
    places = {name: p.to_local().data_ptr() for name, p in model.named_parameters()}
    assert all(isinstance(p, DTensor) and p.placements == (Shard(0),) for p in model.parameters())
    torch.testing.assert_close(model(images()), before, rtol=1e-4, atol=1e-5)
    inverse = rescaling.inverse()
    inverse.apply_()
    assert {name: p.to_local().data_ptr() for name, p in model.named_parameters()} == places
    traced = dagpath.trace(model, images())
    other = dagpath.trace(residual_network(), images())
    assert dagpath.path_norm(traced) == pytest.approx(dagpath.path_norm(other), rel=1e-6)
    assert traced.unroll().path_count() == dagpath.path_count(other) == dagpath.path_count(traced)
    with pytest.raises(TypeError, match=r"'stem.weight' is spread over processes .*Rebalance works"):
        dagpath.optim.PathSGD(traced, lr=0.1)


def train(model: nn.Module, spread: bool) -> list[Tensor]:
    """Steps on batches of which every process has its part, or one process all; the factors found on the way."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    traced = dagpath.trace(model, images().double())
    rebalance = dagpath.optim.Rebalance(traced, optimizer, every=2, power_of_two=True)
    generator = torch.Generator().manual_seed(7)
    ranks = dist.get_world_size()
    found = []
    for _ in range(4):
        batch = torch.randn(2 * ranks, 2, 6, 6, dtype=torch.float64, generator=generator)
        part = batch.chunk(ranks)[dist.get_rank()] if spread else batch
        optimizer.zero_grad()
        model(part).square().mean().backward()
        optimizer.step()
        if rebalance.rescaling is not None:
            found.append(rebalance.rescaling.log_scales)
    return found


def training_goes_on_as_in_one_process() -> None:
    for wrap in (DistributedDataParallel, sharded):
        plain = residual_network().double().eval()  # batch norms apart, whose batches are parts of the whole one
        model = wrap(copy.deepcopy(plain)).eval()
        expected, found = train(plain, spread=False), train(model, spread=True)
        assert len(found) == 3
        for z, other in zip(found, expected, strict=True):
            assert_same_everywhere(z)
            torch.testing.assert_close(z, other, rtol=1e-6, atol=1e-6)
        for name, value in values(model).items():
            torch.testing.assert_close(value, values(plain)[name], rtol=1e-6, atol=1e-9)


def a_model_whose_tensors_are_split_is_rescaled_where_it_lies() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    plain = mlp(5, 8, 12, 3)
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    model = parallelize_module(copy.deepcopy(plain), mesh, plan)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    before = model(x)
    rescaling = dagpath.rescale_(model, x)
    rescale_alike_(plain, x, rescaling)
    assert_same(model, plain)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def a_model_that_is_split_and_sharded_is_rescaled_where_it_lies() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(0)
    plain = mlp(5, 8, 12, 3)
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel(), "4": ColwiseParallel()}
    model = sharded(parallelize_module(copy.deepcopy(plain), mesh["tensor"], plan), mesh=mesh["data"])
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    rescaling = dagpath.rescale_(model, x)
    rescale_alike_(plain, x, rescaling)
    assert_same_everywhere(rescaling.log_scales)
    assert_same(model, plain)


def what_fails_in_one_process_fails_in_all() -> None:
    torch.manual_seed(0)
    model = mlp(2, 8, 2).half()
    with torch.no_grad():
        model[0].weight[0] = 60000.0  # in the first shard alone
    sharded(model)
    traced = dagpath.trace(model, torch.zeros(1, 2).half())
    before = values(model)
    scales = torch.full((8,), 1.0, dtype=torch.float64)
    mine = "0.weight" if dist.get_rank() == 0 else "another process failed"
    with pytest.raises(dagpath.BalanceError, match=mine):
        dagpath.Rescaling(traced, scales).apply_()
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())
    plain = DistributedDataParallel(mlp(2, 8, 2))
    before = values(plain)

    def fail(module, args, output):  # once it is rescaled
        if torch.compiler.is_compiling() or output.is_meta or dist.get_rank():
            return
        if not all(torch.equal(value, before[name]) for name, value in values(plain).items()):
            raise RuntimeError("out of cheese")

    plain.module[2].register_forward_hook(fail)
    kind = dagpath.CaptureError if dist.get_rank() == 0 else dagpath.DagpathError
    with pytest.raises(kind, match="out of cheese" if dist.get_rank() == 0 else "another process failed"):
        dagpath.rescale_(plain, torch.randn(2, 2))
    assert all(torch.equal(value, before[name]) for name, value in values(plain).items())


def calls_to_compare_that_differ_are_refused_in_all() -> None:
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    for differs in ("examples", "modes"):
        model = DistributedDataParallel(mlp(4, 8, 3))
        before = values(model)
        if differs == "modes" and dist.get_rank() == 0:
            model.module[0].eval()
        more = [x[:1]] if differs == "examples" and dist.get_rank() == 0 else []
        with pytest.raises(ValueError, match="the calls to compare differ between the processes"):
            dagpath.rescale_(model, x, more_examples=more)
        assert all(torch.equal(value, before[name]) for name, value in values(model).items())


def random_factors_are_those_of_the_first() -> None:
    torch.manual_seed(dist.get_rank())
    for wrap in (DistributedDataParallel, sharded):
        plain = residual_network()
        model = wrap(copy.deepcopy(plain))
        torch.manual_seed(dist.get_rank())
        rescaling = dagpath.random_rescaling(dagpath.trace(model, images()))
        assert_same_everywhere(rescaling.log_scales)
        rescaling.apply_()
        x = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=1e-3, atol=1e-4)


def everything_that_reads_parameters_works_where_they_are_spread() -> None:
    torch.manual_seed(0)
    plain = Net(
        lambda m, x: m.head(m.cell(m.enter(x).relu())[0].relu() * m.gain * m.gain),
        enter=nn.Linear(4, 6),
        cell=nn.GRU(6, 5, batch_first=True),
        gain=torch.rand(5),
        head=nn.Linear(5, 3),
    )
    model = fully_shard(copy.deepcopy(plain))
    x = torch.randn(2, 3, 4)
    expected, found = dagpath.trace(plain, x), dagpath.trace(model, x)
    torch.testing.assert_close(dagpath.path_mass(found), dagpath.path_mass(expected))
    for criterion in ("pathcond", "equinorm", "range"):
        one, other = dagpath.balance(expected, criterion), dagpath.balance(found, criterion)
        assert one.live == other.live
        torch.testing.assert_close(one.log_scales, other.log_scales)


def calls_that_differ_are_refused_in_all() -> None:
    rank = dist.get_rank()
    model, x = DistributedDataParallel(mlp(4, 8, 3)), torch.zeros(1, 4)
    before = values(model)
    kind = ValueError if rank else dagpath.DagpathError
    with pytest.raises(kind, match="tol must be positive" if rank else "another process failed"):
        dagpath.rescale_(model, x, tol=-1.0 if rank else 1e-9)
    with pytest.raises(dagpath.DagpathError, match="forward raised" if rank else "another process failed"):
        dagpath.rescale_(model, torch.zeros(1, 5) if rank else x)
    with pytest.raises(ValueError, match="the options of balancing differ between the processes"):
        dagpath.rescale_(model, x, "range" if rank else "pathcond")
    with pytest.raises(ValueError, match="the arguments of rescale_ differ between the processes"):
        dagpath.rescale_(model, x, verify=bool(rank))
    with torch.no_grad():
        model.module[0].weight[rank, 0] = float("nan") if rank else 1.0
    with pytest.raises(dagpath.BalanceError, match="not finite" if rank else "another process failed"):
        dagpath.rescale_(model, x)
    with torch.no_grad():
        model.module[0].weight.copy_(before["0.weight"])
    with warnings.catch_warnings():
        warnings.simplefilter("error" if rank else "ignore")
        nan = torch.full((1, 4), float("nan"))
        try:
            dagpath.rescale_(model, nan if rank else x)
            assert not rank
        except UserWarning:  # raised once everything is done
            assert rank
    assert_same_everywhere(model.module[0].weight.detach())
    alone = mlp(4, 8, 3)
    with pytest.warns(UserWarning, match="processes train together, but this trace is of a model of one process"):
        dagpath.optim.Rebalance(dagpath.trace(alone, x), torch.optim.SGD(alone.parameters(), lr=0.1), every=2)


def what_would_be_lost_in_a_half_type_is_refused_in_shards_too() -> None:
    torch.manual_seed(0)
    plain = mlp(4, 8, 3).half()
    with torch.no_grad():
        plain[0].weight[:, 1:].mul_(1e-3)
    scales = torch.full((8,), -7.0, dtype=torch.float64)
    model = sharded(copy.deepcopy(plain))
    outcomes = []
    for one in (plain, model):
        try:
            dagpath.Rescaling(dagpath.trace(one, torch.zeros(1, 4).half()), scales).apply_()
            outcomes.append(True)
        except dagpath.BalanceError:
            outcomes.append(False)
    assert outcomes[0] == outcomes[1]
    assert_same(model, plain)


def parameters_that_stay_gathered_are_found() -> None:
    model = fully_shard(mlp(4, 8, 3), reshard_after_forward=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        model(torch.zeros(1, 4))
    rebalance = dagpath.optim.Rebalance(dagpath.trace(model, torch.zeros(1, 4)), optimizer, every=1)
    with torch.no_grad():
        model(torch.zeros(1, 4))
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    assert rebalance.rescaling.converged


def a_model_that_computes_in_a_half_type_is_compared_in_it() -> None:
    torch.manual_seed(0)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    model = sharded(mlp(8, 32, 32, 3), mp_policy=policy)
    assert dagpath.rescale_(model, torch.randn(4, 8)).difference < 0.2


def spread_state_of_another_kind_is_multiplied_in_its_own_place() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    plain = mlp(3, 8, 2)
    model = copy.deepcopy(plain)
    for layer in (model[0], model[2]):  # columns, and rows that not every process has
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(1)]))
        layer.bias = nn.Parameter(distribute_tensor(layer.bias.detach(), mesh, [Shard(0)]))
    x = torch.zeros(1, 3)
    expected, found = dagpath.trace(plain, x), dagpath.trace(model, x)
    scales = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dagpath.Rescaling(expected, scales).apply_()
    dagpath.Rescaling(found, scales).apply_()
    assert_same(model, plain)


SCENES = [
    a_replicated_model_is_rescaled_alike,
    a_sharded_model_is_rescaled_where_it_lies,
    training_goes_on_as_in_one_process,
    a_model_whose_tensors_are_split_is_rescaled_where_it_lies,
    a_model_that_is_split_and_sharded_is_rescaled_where_it_lies,
    what_fails_in_one_process_fails_in_all,
    random_factors_are_those_of_the_first,
    everything_that_reads_parameters_works_where_they_are_spread,
    calls_that_differ_are_refused_in_all,
    calls_to_compare_that_differ_are_refused_in_all,
    what_would_be_lost_in_a_half_type_is_refused_in_shards_too,
    parameters_that_stay_gathered_are_found,
    a_model_that_computes_in_a_half_type_is_compared_in_it,
    spread_state_of_another_kind_is_multiplied_in_its_own_place,
]


SCENES_OF_MANY = [
    a_sharded_model_is_rescaled_where_it_lies,
    training_goes_on_as_in_one_process,
    a_model_that_is_split_and_sharded_is_rescaled_where_it_lies,
    spread_state_of_another_kind_is_multiplied_in_its_own_place,
]
"""Where more than two processes make a difference."""


def scenes(world: int) -> list:
    return SCENES if world == 2 else SCENES_OF_MANY


def run_all(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        for scene in scenes(world):
            scene()
            Path(folder, f"{scene.__name__} {rank}").touch()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_a_model(world, tmp_path):
    mp.spawn(run_all, (world, str(tmp_path)), nprocs=world)
    for scene in scenes(world):
        assert len(list(tmp_path.glob(f"{scene.__name__} *"))) == world


def test_flattened_parameters_are_refused(monkeypatch):
    from torch.distributed.fsdp import FullyShardedDataParallel

    class Flattened(FullyShardedDataParallel):
        def __init__(self) -> None:
            nn.Module.__init__(self)

    for model in (Flattened(), nn.Sequential(nn.Linear(3, 3), Flattened())):
        with pytest.raises(TypeError, match=r"use torch\.distributed\.fsdp\.fully_shard"):
            dagpath.trace(model, torch.zeros(1, 3))
