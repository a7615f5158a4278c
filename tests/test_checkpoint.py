"""Rescaled files hold what a rescaled model holds, appear as a whole, and are made without loading them as a whole."""

import copy
import errno
import json
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dagpath
from dagpath.runtime import files

from invariance import rescale_alike_
from networks import Net, RandomNet, mlp


def save_sharded(model: nn.Module, folder: Path, count: int) -> Path:
    """The tensors of a model, one after the other, in several files."""
    folder.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    names = [f"model-{index + 1:05}-of-{count:05}.safetensors" for index in range(count)]
    places = {name: names[index * count // len(tensors)] for index, name in enumerate(tensors)}
    for file in names:
        save_file({name: tensors[name] for name in tensors if places[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def load_all(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def on_meta(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to("meta")


def assert_holds(tensors: dict[str, Tensor], model: nn.Module) -> None:
    expected = model.state_dict()
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("seed", range(6))
def test_a_file_is_rescaled_as_the_model_is(seed, tmp_path):
    net = RandomNet(seed)
    save_file(net.state_dict(), tmp_path / "in.safetensors", {"origin": "here"})
    before = (tmp_path / "in.safetensors").read_bytes()
    found = dagpath.rescale_checkpoint(
        on_meta(net), net.example(), tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    )
    rescale_alike_(net, net.example(), found)
    assert_holds(load_file(tmp_path / "out.safetensors"), net)
    assert (tmp_path / "in.safetensors").read_bytes() == before
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"origin": "here"}
    assert {path.name for path in tmp_path.iterdir()} == {"in.safetensors", "out.safetensors"}


@pytest.mark.parametrize("given", ["folder", "index"])
def test_shards_are_rescaled_as_the_model_is(given, tmp_path):
    torch.manual_seed(0)
    net = mlp(4, 8, 9, 7, 3)
    folder = save_sharded(net, tmp_path / "in", 3)
    before = contents(folder)
    weights = folder if given == "folder" else folder / "model.safetensors.index.json"
    found = dagpath.rescale_checkpoint(on_meta(net), torch.zeros(1, 4), weights, tmp_path / "out", power_of_two=True)
    rescale_alike_(net, torch.zeros(1, 4), found, power_of_two=True)
    assert_holds(load_all(tmp_path / "out"), net)
    assert contents(folder) == before
    assert contents(tmp_path / "out").keys() == before.keys()
    assert dagpath.rescale_checkpoint(on_meta(net), torch.zeros(1, 4), tmp_path / "out", tmp_path / "again").converged


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_stay_whatever_the_model_is_made_of(dtype, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).to(dtype).eval()
    save_file(net.state_dict(), tmp_path / "in.safetensors")
    meta = on_meta(net).float()
    paths = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    found = dagpath.rescale_checkpoint(meta, torch.zeros(2, 4), *paths)
    rescale_alike_(net, torch.zeros(2, 4, dtype=dtype), found)
    assert_holds(load_file(tmp_path / "out.safetensors"), net)


REFERENCE = dagpath.PathConditioning({"0.weight": 2.0, "2.weight": 1.0})


@pytest.mark.parametrize("criterion", ["equinorm", "range", REFERENCE])
def test_other_criteria_are_minimized_too(criterion, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
    save_file(net.state_dict(), tmp_path / "in.safetensors")
    paths = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    found = dagpath.rescale_checkpoint(on_meta(net), torch.zeros(1, 4), *paths, criterion=criterion)
    rescale_alike_(net, torch.zeros(1, 4), found, criterion)
    assert_holds(load_file(tmp_path / "out.safetensors"), net)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.code, self.out = nn.Linear(5, 5), nn.Linear(5, 5)
        self.out.weight = self.code.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.code(x)))


@pytest.mark.parametrize("kept", ["code.weight", "out.weight", "both"])
def test_a_parameter_that_is_used_twice_may_be_stored_once_or_twice(kept, tmp_path):
    torch.manual_seed(0)
    net = Tied()
    tensors = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for name in {"code.weight", "out.weight"} - {kept} if kept != "both" else ():
        del tensors[name]
    save_file(tensors, tmp_path / "in.safetensors")
    paths = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    with torch.device("meta"):
        empty = Tied()
    found = dagpath.rescale_checkpoint(empty, torch.zeros(1, 5), *paths)
    rescale_alike_(net, torch.zeros(1, 5), found)
    for name, tensor in load_file(tmp_path / "out.safetensors").items():
        assert torch.equal(tensor, net.state_dict()[name])


def test_names_may_have_a_prefix(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(mlp(4, 8, 3), nn.BatchNorm1d(3)).eval()
    save_file({f"module.{name}": tensor for name, tensor in net.state_dict().items()}, tmp_path / "in.safetensors")
    paths = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match=r"has no '0.0.weight', .* in the files are 'module.0.0.bias', .*\.\.\."):
        dagpath.rescale_checkpoint(on_meta(net), torch.zeros(2, 4), *paths)
    found = dagpath.rescale_checkpoint(on_meta(net), torch.zeros(2, 4), *paths, prefix="module.")
    rescale_alike_(net, torch.zeros(2, 4), found)
    rescaled = load_file(tmp_path / "out.safetensors")
    assert_holds({name.removeprefix("module."): tensor for name, tensor in rescaled.items()}, net)


def test_constants_that_are_computed_and_not_stored_are_those_of_the_model(tmp_path):
    torch.manual_seed(0)
    net = Net(lambda m, x: m.b(F.relu(m.a(x)) * m.gate * torch.arange(6)), a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    net.register_buffer("gate", torch.rand(6), persistent=False)
    save_file(net.state_dict(), tmp_path / "in.safetensors")
    paths = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match=r"the buffer 'gate' has no values: it is not in .*in.safetensors"):
        dagpath.rescale_checkpoint(on_meta(net), torch.zeros(1, 4), *paths)
    assert not (tmp_path / "out.safetensors").exists()
    partly = on_meta(net)
    partly.gate = net.gate
    found = dagpath.rescale_checkpoint(partly, torch.zeros(1, 4), *paths)
    rescale_alike_(net, torch.zeros(1, 4), found)


def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path):
    net = mlp(3, 4, 2)
    good = net.state_dict()
    out = tmp_path / "out.safetensors"
    nan = {**good, "0.bias": torch.tensor([0.0, 1.0, float("nan"), 2.0])}
    cases = [
        ({name: good[name] for name in list(good)[1:]}, ValueError, "has no '0.weight', a parameter of the model"),
        ({**good, "extra": torch.zeros(2)}, ValueError, r"has 'extra', which the model does not have \(1 such"),
        ({**good, "0.bias": torch.zeros(3)}, ValueError, r"'0.bias' in .* has shape \(3,\), the model's \(4,\)"),
        (nan, dagpath.BalanceError, r"'0.bias' has 1 value that is not finite, the first at index \(2,\): nan"),
    ]
    for tensors, kind, message in cases:
        save_file(tensors, tmp_path / "in.safetensors")
        with pytest.raises(kind, match=message):
            dagpath.rescale_checkpoint(on_meta(net), torch.zeros(1, 3), tmp_path / "in.safetensors", out)
    save_file(good, tmp_path / "in.safetensors")
    (tmp_path / "folder").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        save_file(good, tmp_path / "two" / f"{name}.safetensors")
    (tmp_path / "text.safetensors").write_text("something else")
    (tmp_path / "bad.safetensors.index.json").write_text('{"weights": {}}')
    (tmp_path / "far.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    (tmp_path / "other.safetensors.index.json").write_text('{"weight_map": {"0.bias": "in.safetensors"}}')
    source = tmp_path / "in.safetensors"
    for weights, target, kind, message in [
        (source, source, ValueError, "is the file that is read: name another"),
        (source, tmp_path / "folder", FileExistsError, "is a folder: name a file"),
        (source, tmp_path / "none" / "out.safetensors", FileNotFoundError, "there is no folder"),
        (tmp_path / "none.safetensors", out, FileNotFoundError, "there is no file"),
        (tmp_path / "folder", out, FileNotFoundError, r"has no \*.safetensors"),
        (tmp_path / "two", out, ValueError, r"has 2 files \*.safetensors: name the one that is meant"),
        (tmp_path / "text.safetensors", out, ValueError, "is no safetensors file"),
        (tmp_path / "bad.safetensors.index.json", out, ValueError, "is no index of safetensors files"),
        (tmp_path / "far.safetensors.index.json", out, ValueError, "which is in another folder"),
        (tmp_path / "other.safetensors.index.json", out, ValueError, "do not agree: '0.weight' is in one of"),
    ]:
        with pytest.raises(kind, match=message):
            dagpath.rescale_checkpoint(on_meta(net), torch.zeros(1, 3), weights, target)
    assert not out.exists()
    shards = save_sharded(net, tmp_path / "shards", 2)
    before = contents(shards)
    with pytest.raises(FileExistsError, match="exists: name a folder that does not, for 2 files"):
        dagpath.rescale_checkpoint(on_meta(net), torch.zeros(1, 3), shards, shards)
    assert contents(shards) == before


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_parameters_that_are_no_floating_point_numbers_are_refused(dtype, tmp_path):
    net = mlp(3, 4, 2)
    save_file({**net.state_dict(), "2.weight": torch.ones(2, 4).to(dtype)}, tmp_path / "in.safetensors")
    paths = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match=r"'2.weight' in .* is of type \w+: only parameters of type F64, .* can be"):
        dagpath.rescale_checkpoint(on_meta(net), torch.zeros(1, 3), *paths)
    assert {path.name for path in tmp_path.iterdir()} == {"in.safetensors"}


def test_statistics_of_another_shape_are_refused(tmp_path):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    save_file({**net.state_dict(), "1.running_var": torch.ones(1)}, tmp_path / "in.safetensors")
    paths = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match=r"'1.running_var' in .* has shape \(1,\), the model's \(4,\)"):
        dagpath.rescale_checkpoint(on_meta(net), torch.zeros(1, 3), *paths)


def test_copies_of_one_parameter_that_differ_are_refused(tmp_path):
    net = Tied()
    tensors = {**net.state_dict(), "out.weight": torch.randn(5, 5)}
    save_file(tensors, tmp_path / "in.safetensors")
    paths = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    with torch.device("meta"):
        empty = Tied()
    with pytest.raises(ValueError, match=r"'code.weight', 'out.weight' are one parameter of the model, but differ"):
        dagpath.rescale_checkpoint(empty, torch.zeros(1, 5), *paths)


def test_weights_that_would_lose_what_counts_are_refused_as_in_memory(tmp_path):
    torch.manual_seed(0)
    net = mlp(4, 8, 3).half()
    with torch.no_grad():
        net[0].weight.mul_(1e-2)
        net[2].weight.mul_(100)
        net[2].weight[:, 0].mul_(1e-6)
        net[0].weight[0].mul_(1e4)
    save_file(net.state_dict(), tmp_path / "in.safetensors")
    paths = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    outcomes = []
    for criterion in ("pathcond", "equinorm", "range"):
        for rescale in (
            lambda criterion: dagpath.rescale_(copy.deepcopy(net), torch.zeros(1, 4).half(), criterion, verify=False),
            lambda criterion: dagpath.rescale_checkpoint(on_meta(net), torch.zeros(1, 4), *paths, criterion=criterion),
        ):
            try:
                rescale(criterion)
                outcomes.append("")
            except dagpath.BalanceError as error:
                outcomes.append(str(error))
    assert outcomes[::2] == outcomes[1::2]


def test_permissions_stay_and_links_lead_on(tmp_path):
    net = mlp(3, 4, 2)
    source, out, link = (tmp_path / f"{name}.safetensors" for name in ("in", "out", "link"))
    save_file(net.state_dict(), source)
    source.chmod(0o600)
    link.symlink_to(out)
    dagpath.rescale_checkpoint(on_meta(net), torch.zeros(1, 3), source, link)
    assert link.is_symlink()
    assert out.stat().st_mode & 0o777 == 0o600
    out.chmod(0o640)
    dagpath.rescale_checkpoint(on_meta(net), torch.zeros(1, 3), source, out)
    assert out.stat().st_mode & 0o777 == 0o640


def test_a_bad_place_is_refused_before_anything_is_traced(tmp_path):
    net = mlp(3, 4, 2)
    shards = save_sharded(net, tmp_path / "shards", 2)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for out, kind in ((shards, FileExistsError), (tmp_path / "no" / "out", FileNotFoundError),
                      (tmp_path / "dangling", FileExistsError)):  # fmt: skip
        with pytest.raises(kind):
            dagpath.rescale_checkpoint(net, "no input", shards, out)
    with pytest.raises(ValueError, match="tol must be positive"):
        dagpath.rescale_checkpoint(net, "no input", shards, tmp_path / "out", tol=-1.0)


def test_an_overflow_of_a_half_type_leaves_no_file(tmp_path):
    net = mlp(1, 2, 50).half()  # the masses that leave are the larger ones, so that what enters is to grow
    for parameter in net.parameters():
        nn.init.constant_(parameter, 60000.0)
    save_file(net.state_dict(), tmp_path / "in.safetensors")
    paths = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    with pytest.raises(dagpath.BalanceError, match=r"0\.(weight|bias).*float16; rescale by less"):
        dagpath.rescale_checkpoint(on_meta(net), torch.zeros(1, 1), *paths)
    assert {path.name for path in tmp_path.iterdir()} == {"in.safetensors"}


def steps_of_writing(monkeypatch, fail_at: int, error: BaseException) -> list[str]:
    """Count the steps of writing; the one of the given number raises."""
    done: list[str] = []

    def failing(owner, name):
        real = getattr(owner, name)

        def step(*args, **kwargs):
            done.append(name)
            if len(done) == fail_at:
                raise error
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, step)

    from dagpath import checkpoint

    failing(checkpoint.shutil, "copy")
    failing(checkpoint, "multiply_one_")
    failing(files.os, "fsync")
    failing(files.Path, "replace")
    return done


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_failure_at_any_step_leaves_the_files_as_they_were(kind, tmp_path):
    torch.manual_seed(0)
    net = mlp(3, 4, 5, 2)
    where = tmp_path / "files"
    where.mkdir()
    if kind == "file":
        weights, out = where / "in.safetensors", where / "out.safetensors"
        save_file(net.state_dict(), weights)
        out.write_bytes(b"older")
    else:
        weights, out = save_sharded(net, where / "in", 3), where / "out"
    before, source = contents(where), on_meta(net)
    found = dagpath.rescale_checkpoint(source, torch.zeros(1, 3), weights, tmp_path / "expected")
    rescale_alike_(net, torch.zeros(1, 3), found)
    full, stopped = OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()
    steps = 9 if kind == "file" else 16
    for number in range(1, steps + 1):
        with pytest.MonkeyPatch.context() as patch:
            done = steps_of_writing(patch, number, full if number % 2 else stopped)
            with pytest.raises((OSError, KeyboardInterrupt)):
                dagpath.rescale_checkpoint(source, torch.zeros(1, 3), weights, out)
        if number < steps:
            assert contents(where) == before, done
    assert done[-2:] == ["replace", "fsync"]  # what fails after the name is given finds everything new
    assert_holds(load_file(out) if kind == "file" else load_all(out), net)
    assert not list(where.glob(".dagpath*"))


def test_a_disk_that_is_full_leaves_no_file(tmp_path):
    net = mlp(30, 40, 20)
    save_file(net.state_dict(), tmp_path / "in.safetensors")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            dagpath.rescale_checkpoint(
                on_meta(net), torch.zeros(1, 30), tmp_path / "in.safetensors", tmp_path / "out.safetensors"
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name for path in tmp_path.iterdir()} == {"in.safetensors"}


KILLED = """
    import os, signal, sys, torch, dagpath
    from torch import nn
    from dagpath.runtime import files
    folder, last = sys.argv[1], int(sys.argv[2])
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to("meta")
    events = []

    def audit(event, args):  # every opening, copying, renaming and removal of files in the folder
        if any(isinstance(part, str) and part.startswith(folder) for part in args):
            events.append(event)
            if len(events) == last:
                os.kill(os.getpid(), signal.SIGKILL)

    traced = dagpath.trace(net, torch.zeros(1, 3))
    sys.addaudithook(audit)
    dagpath.rescale_checkpoint(net, torch.zeros(1, 3), f"{folder}/in.safetensors", f"{folder}/out.safetensors")
    print(*events)
"""


def test_a_kill_while_writing_leaves_the_old_file_or_the_new_one(tmp_path):
    torch.manual_seed(0)
    net = mlp(3, 4, 2)
    (tmp_path / "script.py").write_text(textwrap.dedent(KILLED))
    folder = tmp_path / "files"
    folder.mkdir()
    source, out = folder / "in.safetensors", folder / "out.safetensors"
    save_file(net.state_dict(), source)
    before = source.read_bytes()
    found = dagpath.rescale_checkpoint(on_meta(net), torch.zeros(1, 3), source, tmp_path / "expected.safetensors")
    rescale_alike_(net, torch.zeros(1, 3), found)

    def run(last: int) -> subprocess.CompletedProcess:
        out.write_bytes(b"older")
        command = [sys.executable, str(tmp_path / "script.py"), str(folder), str(last)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    whole = run(0)
    assert_holds(load_file(out), net)
    renamed = whole.stdout.split().index("os.rename") + 1  # an event comes before what it announces
    for last in (renamed, renamed + 1):
        assert run(last).returncode == -signal.SIGKILL
        assert source.read_bytes() == before
        if last == renamed:
            assert out.read_bytes() == b"older"
        else:
            assert_holds(load_file(out), net)


MEMORY = """
    import resource, sys, torch, dagpath
    from torch import nn
    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.norm = nn.LayerNorm(width)
            self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        def forward(self, x):
            return x + self.narrow(torch.relu(self.wide(self.norm(x))))
    def make():
        return nn.Sequential(*[Block(512) for _ in range(24)])
    torch.set_num_threads(1)
    if sys.argv[1] == "make":
        import json
        from safetensors.torch import save_file
        tensors, places, shards = make().state_dict(), {}, 4
        for index in range(shards):
            names = list(tensors)[index * len(tensors) // shards : (index + 1) * len(tensors) // shards]
            file = f"model-{index}.safetensors"
            save_file({name: tensors[name] for name in names}, f"{sys.argv[2]}/{file}")
            places |= dict.fromkeys(names, file)
        with open(f"{sys.argv[2]}/model.safetensors.index.json", "w") as index:
            json.dump({"weight_map": places}, index)
    else:
        with torch.device("meta"):
            net = make()
        x = torch.zeros(1, 5, 512)
        small = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        dagpath.balance(dagpath.trace(small, torch.zeros(1, 3)))
        dagpath.trace(net, x)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = dagpath.rescale_checkpoint(net, x, sys.argv[2], sys.argv[2] + ".out")
        print(found.converged, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted in kilobytes there")
def test_less_than_two_shards_are_in_memory_at_a_time(tmp_path):
    (tmp_path / "script.py").write_text(textwrap.dedent(MEMORY))
    folder = tmp_path / "shards"
    folder.mkdir()
    for task in ("make", "rescale"):
        command = [sys.executable, str(tmp_path / "script.py"), task, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    converged, grown = done.stdout.split()
    assert converged == "True"
    shard = max(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert shard > 5e7
    assert int(grown) < 2 * shard
