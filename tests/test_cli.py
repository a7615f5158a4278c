"""The command line does what the library does, and says what went wrong."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import dagpath
from dagpath.cli import app as cli

SOURCE = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

def embedding():
    return nn.Sequential(nn.Embedding(10, 8), nn.ReLU(), nn.Linear(8, 2))

def number():
    return 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(SOURCE)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    save_file(net.state_dict(), tmp_path / "in.safetensors")
    save_file(nn.Sequential(nn.Embedding(10, 8), nn.ReLU(), nn.Linear(8, 2)).state_dict(), tmp_path / "ids.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    return tmp_path


def run(capsys, monkeypatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["dagpath", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    printed = capsys.readouterr()
    return stopped.value.code or 0, printed.out, printed.err


RESCALE = ["rescale", "nets.py:build", "--input", "1,4", "--weights", "in.safetensors", "--out", "out.safetensors"]


@pytest.mark.parametrize("module", ["nets.py", "nets"])
@pytest.mark.parametrize("options", [[], ["--power-of-two"], ["--criterion", "equinorm"], ["--with-values"]])
def test_weights_are_rescaled_as_the_library_rescales_them(module, options, folder, capsys, monkeypatch):
    before = Path("in.safetensors").read_bytes()
    command = [argument.replace("nets.py", module) for argument in RESCALE]
    code, out, _ = run(capsys, monkeypatch, *command, *options)
    assert code == 0
    assert "criterion after" in out
    assert "written: out.safetensors" in out
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).to("meta")
    criterion = "equinorm" if "equinorm" in options else "pathcond"
    files, power_of_two = ("in.safetensors", "expected.safetensors"), "--power-of-two" in options
    dagpath.rescale_checkpoint(net, torch.zeros(1, 4), *files, criterion, power_of_two=power_of_two)
    assert Path("out.safetensors").read_bytes() == Path("expected.safetensors").read_bytes()
    assert Path("in.safetensors").read_bytes() == before


def test_json_is_one_object(folder, capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, *RESCALE, "--json")
    found = json.loads(out)
    assert (code, found["converged"], found["groups"], found["out"]) == (0, True, 8, "out.safetensors")
    assert found["objective"][1] < found["objective"][0]


def test_inputs_may_be_of_other_types(folder, capsys, monkeypatch):
    weights = ["--weights", "ids.safetensors", "--out", "out.safetensors"]
    code, out, _ = run(capsys, monkeypatch, "rescale", "nets:embedding", "--input", "1,5:int64", *weights)
    assert code == 0, out


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({1: "nets.py:none"}, 2, "has no function 'none'"),
        ({1: "build"}, 2, "is not of the form MODULE:FACTORY"),
        ({1: "none.py:build"}, 2, "there is no file none.py"),
        ({1: "nowhere:build"}, 1, "No module named 'nowhere'"),
        ({1: "nets.py:number"}, 1, "returned int, not a torch.nn.Module"),
        ({3: "1,x"}, 2, "is no shape such as 1,3,224,224"),
        ({3: "0,4"}, 2, "is no shape such as 1,3,224,224"),
        ({3: "1,4:float33"}, 2, "is no shape such as 1,3,224,224"),
        ({3: "1,5"}, 1, "forward raised on the example inputs"),
        ({5: "none.safetensors"}, 1, "there is no file none.safetensors"),
        ({5: "ids.safetensors"}, 1, "has no '0.bias'"),
        ({7: "in.safetensors"}, 1, "is the file that is read"),
        ({6: "--over"}, 2, "No such option"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(change, code, words, folder, capsys, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    arguments = [change.get(index, argument) for index, argument in enumerate(RESCALE)]
    found, _, error = run(capsys, monkeypatch, *arguments)
    assert found == code
    assert re.search(words, " ".join(error.replace("│", " ").split())), error
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_a_model_is_explained_without_values(folder, capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "explain", "nets.py:build", "--input", "1,4")
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    traced = dagpath.trace(net, torch.zeros(1, 4))
    assert (code, out) == (0, traced.explain() + "\n")
    code, out, _ = run(capsys, monkeypatch, "explain", "nets.py:build", "--input", "1,4", "--json")
    assert json.loads(out) == traced.explain("dict")


def test_a_page_is_written_beside_the_explanation(folder, capsys, monkeypatch):
    arguments = ("explain", "nets.py:build", "--input", "1,4", "--weights", "in.safetensors", "--html", "page.html")
    code, out, _ = run(capsys, monkeypatch, *arguments)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    net.load_state_dict(load_file("in.safetensors"))
    traced = dagpath.trace(net, torch.zeros(1, 4))
    assert (code, out) == (0, traced.explain() + "\n\nwritten: page.html\n")
    assert Path("page.html").read_text(encoding="utf-8") == dagpath.html_report(traced)


@pytest.mark.parametrize(
    ("html", "words"),
    [
        ("in.safetensors", "in.safetensors is the file that is read"),
        ("nets.py", "nets.py is the file that is read"),
        ("none/page.html", "there is no folder"),
        (".", "is a directory"),
    ],
)
def test_a_page_that_cannot_be_written_changes_nothing(html, words, folder, capsys, monkeypatch):
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    arguments = ("explain", "nets.py:build", "--input", "1,4", "--weights", "in.safetensors", "--html", html)
    code, _, errors = run(capsys, monkeypatch, *arguments)
    assert code in (1, 2)
    assert words in errors
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("file", ["in.safetensors", "in.pt"])
def test_paths_are_counted_and_weighed(file, folder, capsys, monkeypatch):
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    net.load_state_dict(load_file("in.safetensors"))
    torch.save(net.state_dict(), "in.pt")
    traced = dagpath.trace(net, torch.zeros(1, 4))
    command = ["paths", "nets.py:build", "--input", "1,4", "--weights", file]
    code, out, _ = run(capsys, monkeypatch, *command, "--json", "--top", "3")
    found = json.loads(out)
    assert (code, found["paths"]) == (0, 4 * 8 * 2 + 8 * 2 + 2)
    assert found["log_path_norm_2"] == pytest.approx(dagpath.path_norm(traced, 2, log=True), rel=1e-13)
    assert [path["value"] for path in found["top"]] == [path.value for path in dagpath.top_paths(traced, 3)]
    code, out, _ = run(capsys, monkeypatch, *command)
    assert code == 0
    assert "log of the path-norm, p = 1" in out
    assert "→" in out


def test_a_rescaled_file_is_at_no_distance_in_paths(folder, capsys, monkeypatch):
    run(capsys, monkeypatch, *RESCALE, "--power-of-two")
    both = ["compare", "in.safetensors", "out.safetensors", "--model", "nets.py:build", "--input", "1,4"]
    code, out, _ = run(capsys, monkeypatch, *both, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["relative_path_distance"] < 1e-7
    assert found["relative_parameter_differences"]["2.bias"] == 0
    code, out, _ = run(capsys, monkeypatch, *both)
    assert "relative difference" in out


def test_files_that_hold_code_are_not_run(folder, capsys, monkeypatch):
    class Code:
        def __reduce__(self):
            return (print, ("this was run",))

    torch.save({"0.weight": Code()}, "bad.pt")
    code, out, error = run(capsys, monkeypatch, "paths", "nets.py:build", "--input", "1,4", "--weights", "bad.pt")
    assert code == 1
    assert "this was run" not in out + error


def test_a_bound_limits_the_factors(folder, capsys, monkeypatch):
    with pytest.warns(UserWarning, match="held by the bound"):
        code, out, _ = run(capsys, monkeypatch, *RESCALE, "--bound", "1.01")
    assert code == 0
    assert "groups at the bound" in out
    code, _, error = run(capsys, monkeypatch, *RESCALE, "--bound", "0.5")
    assert (code, "--bound must be a factor above 1, got 0.5" in words_of(error)) == (2, True)


def test_a_file_may_be_called_like_a_module_of_python(folder, capsys, monkeypatch):
    (folder / "json.py").write_text(SOURCE)
    code, _, error = run(capsys, monkeypatch, *[part.replace("nets.py", "json.py") for part in RESCALE])
    assert code == 0, error


def test_an_interruption_is_said(folder, capsys, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "rescale_checkpoint", interrupt)
    code, _, error = run(capsys, monkeypatch, *RESCALE)
    assert (code, error) == (130, "interrupted: nothing was written\n")


def test_the_help_says_that_code_is_run(capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "rescale", "--help")
    text = " ".join(out.replace("│", " ").split())
    assert code == 0
    assert "Both are run: name only code that you trust" in text
    assert "Never the input" in text


def test_the_module_is_a_program(folder):
    command = [sys.executable, "-m", "dagpath", *RESCALE]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "written: out.safetensors" in done.stdout


def test_no_file_that_is_read_is_written_over(folder, capsys, monkeypatch):
    tensors = list(load_file("in.safetensors").items())
    (folder / "parts").mkdir()
    for number, part in enumerate((tensors[:2], tensors[2:])):
        save_file(dict(part), folder / f"parts/model-{number}.safetensors")
    index = {
        name: f"model-{number}.safetensors"
        for number, part in enumerate((tensors[:2], tensors[2:]))
        for name, _ in part
    }
    (folder / "parts/model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    before = {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    arguments = ("explain", "nets.py:build", "--input", "1,4", "--weights", "parts", "--html")
    for html in ("parts/model-1.safetensors", "parts/model.safetensors.index.json", "./nets.py"):
        code, _, errors = run(capsys, monkeypatch, *arguments, html)
        assert code == 1
        assert "is the file that is read" in errors
    code, _, errors = run(
        capsys,
        monkeypatch,
        *("rescale", "nets.py:build", "--input", "1,4", "--weights", "in.safetensors", "--out", "nets.py"),
    )
    assert code == 1
    assert "is the file that is read" in errors
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("explain", "nets.py:build", "--input", "1,4", "--weights", "in.safetensors"), 2, "--weights is for --html"),
        (("paths", "nets.py:build", "--input", "1,4", "--prefix", "net."), 2, "--prefix is for --weights"),
        (("paths", "nets.py:number", "--input", "1,4"), 1, "returned int, not a torch.nn.Module"),
        (("paths", "nets.py:fails", "--input", "1,4"), 1, r"nets.py:fails raised KeyError: 'missing'\n.*nets.py:\d+"),
        (("explain", "nets.py:Asks", "--input", "1,4"), 1, "control flow that does not depend on the values"),
        (
            ("paths", "nets.py:build", "--input", "1,4", "--weights", "ids.safetensors"),
            1,
            r"'0.weight' in .* shape \(10, 8\)",
        ),
        (
            ("paths", "nets.py:build", "--input", "1,4", "--weights", "half.safetensors"),
            1,
            "has no '2.weight' of nets.py",
        ),
        (
            ("paths", "nets.py:build", "--input", "1,4", "--weights", "more.safetensors"),
            1,
            "has '3.bias', which nets.py",
        ),
        (
            ("paths", "nets.py:build", "--input", "1,4", "--weights", "saved.pth"),
            1,
            "of which 'state_dict' are no tensors",
        ),
        (
            ("rescale", "nets.py:build", "--input", "1,4", "--weights", "saved.pth", "--out", "o"),
            1,
            "if torch.save wrote it",
        ),
    ],
)
def test_each_mistake_has_its_message(arguments, code, words, folder, capsys, monkeypatch):
    source = "\ndef fails():\n    return {}['missing']\n\nclass Asks(nn.Linear):\n    def __init__(self):\n"
    source += "        super().__init__(4, 2)\n\n    def forward(self, x):\n"
    source += "        return super().forward(x) if x.sum() > 0 else super().forward(-x)\n"
    (folder / "nets.py").write_text(SOURCE + source)
    tensors = load_file("in.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name.startswith("0")}, "half.safetensors")
    save_file({**tensors, "3.bias": torch.zeros(1)}, "more.safetensors")
    torch.save({"state_dict": tensors}, "saved.pth")
    found, _, errors = run(capsys, monkeypatch, *arguments)
    assert found == code
    assert re.search(words, errors), errors


def test_weights_that_are_not_finite_are_not_compared(folder, capsys, monkeypatch):
    tensors = load_file("in.safetensors")
    tensors["0.weight"][1, 2] = float("nan")
    save_file(tensors, "nan.safetensors")
    arguments = ("in.safetensors", "nan.safetensors", "--model", "nets.py:build", "--input", "1,4")
    code, out, errors = run(capsys, monkeypatch, "compare", *arguments)
    assert (code, out) == (1, "")
    assert "0.weight" in errors


# -- bad input: every message names the cause, and none is a traceback -------------------------------------------------

BAD_MODULES = {
    "syntax.py": ("def f(:", r"syntax.py cannot be imported: its own code raised SyntaxError: .*syntax.py:1"),
    "bytes.py": (b'x = "\xff"', "bytes.py cannot be imported: its own code raised SyntaxError"),
    "null.py": ("a\0b", "null.py cannot be imported: its own code raised SyntaxError"),
    "needs.py": ("import nowhere_at_all", r"needs.py:1\); install 'nowhere_at_all', which it needs"),
    "zero.py": ("1 / 0", r"its own code raised ZeroDivisionError: division by zero \(at .*zero.py:1\)"),
    "leaves.py": ("raise SystemExit(2)", "its own code raised SystemExit: 2"),
    "typed.py": (
        "import torch\ntorch.library.register_fake('nothing::there')(print)",
        "its own code raised RuntimeError",
    ),
    "lazy.py": ("def __getattr__(name): raise KeyError(name)", "its own code raised KeyError"),
    "raises.py": ("def f(): raise KeyError('boom')", r"raises.py:f raised KeyError: 'boom' at .*raises.py:1"),
    "stops.py": ("def f(): raise SystemExit(3)", r"stops.py:f raised SystemExit: 3"),
    "deep.py": ("def f(): return f()", "deep.py:f raised RecursionError"),
    "asks.py": ("def f(x): return x", "asks.py:f raised TypeError: .*missing 1 required positional argument"),
    "kind.py": (
        "from torch.nn import Linear\ndef f(): return Linear",
        "kind.py:f returned type, not a torch.nn.Module",
    ),
    "value.py": ("f = 3", "value.py has no function 'f'"),
    "branch.py": (
        "from torch import nn\nclass N(nn.Module):\n    def forward(self, x): return x if x.sum() > 0 else -x\nf = N",
        "N cannot be captured as a graph: .*branch.py:3",
    ),
}


def words_of(error: str) -> str:
    return " ".join(error.replace("│", " ").split())


@pytest.mark.parametrize("name", BAD_MODULES)
def test_a_module_that_fails_is_named_with_its_line_and_what_to_do(name, folder, capsys, monkeypatch):
    content, words = BAD_MODULES[name]
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, error = run(capsys, monkeypatch, "paths", f"{name}:f", "--input", "1,4")
    assert (code in (1, 2), out) == (True, "")
    assert re.search(words, words_of(error)), error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (
            "nowhere.inside:f",
            "No module named 'nowhere': install its package, run from the folder that has it, or name a",
        ),
        ("torch.nowhere:f", "No module named 'torch.nowhere': install"),
        ("..:f", "a module's name has no dots in front"),
        ("a..b:f", "no two in a row"),
        ("pipe.py:f", "pipe.py is no regular file"),
        ("one.py:f", "'one.py' cannot be read: Too many levels of symbolic links"),
        ("folder.py:f", "folder.py is a folder"),
        (":f", "is not of the form MODULE:FACTORY"),
        ("nets.py:", "is not of the form MODULE:FACTORY"),
        ("os:getcwd", "os:getcwd returned str, not a torch.nn.Module"),
    ],
)
def test_a_module_that_is_none_is_refused(module, words, folder, capsys, monkeypatch):
    os.mkfifo("pipe.py")
    Path("one.py").symlink_to("two.py")
    Path("two.py").symlink_to("one.py")
    Path("folder.py").mkdir()
    code, out, error = run(capsys, monkeypatch, "paths", module, "--input", "1,4")
    assert (code in (1, 2), out) == (True, "")
    assert words in words_of(error)
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ("-1,4", "is no shape such as"),
        ("0,4", "is no shape such as"),
        ("", "is no shape such as"),
        ("1e3,4", "is no shape such as"),
        ("nan", "is no shape such as"),
        ("1;4", "is no shape such as"),
        ("1,4:float32:x", "is no shape such as"),
        ("1,4:Tensor", "is no shape such as"),
        ("1," + "9" * 5000, "is no shape such as"),
        ("1000000,1000000", "has 1e+12 elements, more than 2,147,483,648"),
        ("99999999999999999999,4", "has 4e+20 elements"),
        ("1,4:qint8", "there is no tensor of zeros of torch.qint8"),
        ("1,4:complex64", "forward raised on the example inputs"),
    ],
)
def test_an_absurd_input_is_refused(shape, words, folder, capsys, monkeypatch):
    code, out, error = run(capsys, monkeypatch, "explain", "nets.py:build", "--input", shape)
    if "complex" in shape:  # which the text does not run
        code, out, error = run(capsys, monkeypatch, "paths", "nets.py:build", "--input", shape)
    assert (code in (1, 2), out) == (True, "")
    assert words in words_of(error)


@pytest.mark.parametrize("command", ["paths", "rescale", "compare"])
@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("pipe.safetensors", "pipe.safetensors is no regular file"),
        ("/dev/zero", "/dev/zero is no regular file"),
        ("one.safetensors", "Too many levels of symbolic links"),
        ("folder", r"folder has no \*.safetensors"),
        ("deep.safetensors.index.json", "is no index of safetensors files: RecursionError"),
        ("null.safetensors.index.json", "cannot be read: embedded null byte"),
        ("number.safetensors.index.json", "is no index of safetensors files: TypeError"),
        ("empty.safetensors", "is no safetensors file"),
        ("deep.safetensors", "is no safetensors file"),
        ("nets.py", "is no safetensors file"),
    ],
)
def test_weights_that_are_none_are_refused_and_never_waited_for(weights, words, command, folder, capsys, monkeypatch):
    os.mkfifo("pipe.safetensors")
    Path("one.safetensors").symlink_to("two.safetensors")
    Path("two.safetensors").symlink_to("one.safetensors")
    Path("folder").mkdir()
    Path("deep.safetensors.index.json").write_text("[" * 100_000)
    Path("null.safetensors.index.json").write_text('{"weight_map": {"a": "\\u0000"}}')
    Path("number.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')
    Path("empty.safetensors").write_bytes(b"")
    header = b'{"a":' * 10_000
    Path("deep.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    arguments = {
        "paths": ["paths", "nets.py:build", "--weights", weights],
        "rescale": ["rescale", "nets.py:build", "--weights", weights, "--out", "out.safetensors"],
        "compare": ["compare", "in.safetensors", weights, "--model", "nets.py:build"],
    }[command]
    code, out, error = run(capsys, monkeypatch, *arguments, "--input", "1,4")
    assert (code, out) == (1, "")
    assert re.search(words, words_of(error)), error
    assert not Path("out.safetensors").exists()


@pytest.mark.parametrize("out", ["pipe.safetensors", "/dev/null", "one.safetensors"])
@pytest.mark.parametrize("option", ["--out", "--html"])
def test_what_is_no_file_is_not_replaced(option, out, folder, capsys, monkeypatch):
    os.mkfifo("pipe.safetensors")
    Path("one.safetensors").symlink_to("two.safetensors")
    Path("two.safetensors").symlink_to("one.safetensors")
    command = "rescale" if option == "--out" else "explain"
    weights = "--weights", "in.safetensors"
    code, _, error = run(capsys, monkeypatch, command, "nets.py:build", "--input", "1,4", *weights, option, out)
    assert code == 1
    assert re.search("is no regular file|is a link that leads back to itself", words_of(error)), error
    assert Path("pipe.safetensors").is_fifo()
    assert Path("one.safetensors").is_symlink()
    assert Path("/dev/null").is_char_device()


def test_a_pipe_of_torch_save_is_not_waited_for(folder, capsys, monkeypatch):
    os.mkfifo("pipe.pt")
    code, _, error = run(capsys, monkeypatch, "paths", "nets.py:build", "--input", "1,4", "--weights", "pipe.pt")
    assert (code, "pipe.pt is no regular file" in error) == (1, True)


@pytest.mark.parametrize("bound", ["nan", "0", "-3", "1", "-inf"])
def test_a_bound_that_is_no_factor_is_refused(bound, folder, capsys, monkeypatch):
    code, _, error = run(capsys, monkeypatch, *RESCALE, "--bound", bound)
    assert (code, "--bound must be a factor above 1" in words_of(error)) == (2, True)


@pytest.mark.parametrize("layer", ["nn.Sigmoid()", "nn.ReLU6()", "nn.Softmax(1)", "nn.GELU()"])
def test_paths_of_a_model_with_a_barrier_are_counted_and_weighed(layer, folder, capsys, monkeypatch):
    parts = f"nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), {layer}, nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)"
    Path("barrier.py").write_text(f"from torch import nn\ndef f(): return nn.Sequential({parts})")
    code, out, error = run(capsys, monkeypatch, "paths", "barrier.py:f", "--input", "1,4", "--json")
    assert code == 0, error
    lengths = json.loads(out)["lengths"]
    assert set(lengths) == {"1", "2"}
    assert sum(lengths.values()) == pytest.approx(1)


def test_an_error_that_nobody_expected_is_one_line_too(folder, capsys, monkeypatch):
    def failing(traced, *_, **__):
        raise ArithmeticError("of a type that nothing raises on purpose")

    monkeypatch.setattr(cli, "path_count", failing)
    code, out, error = run(capsys, monkeypatch, "paths", "nets.py:build", "--input", "1,4")
    assert (code, out) == (1, "")
    assert re.search(r"error ArithmeticError: of a type that .* \(at .*test_cli.py:\d+\); nothing was", words_of(error))
