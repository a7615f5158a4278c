"""torchvision's models are imported where its compiled operators are, and where they are not."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

DEFINED = """
    import torch
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", lambda dets, scores, threshold: torch.arange(len(dets)), "CPU")
"""

REGISTRATIONS = """
    import torch

    @torch.library.register_fake("torchvision::nms")
    def fake_nms(dets, scores, iou_threshold):
        return dets.new_empty(0)
"""

COUNTED = """
    import builtins
    builtins.imported = getattr(builtins, "imported", 0) + 1
"""


def write_torchvision(folder: Path, **modules: str) -> None:
    """A package of the name torchvision: ``first`` is imported before ``registrations``, ``models`` is part of it."""
    package = folder / "torchvision"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("from torchvision import first, registrations, models\n")
    for name, text in {"first": COUNTED, "registrations": REGISTRATIONS, "models": "", **modules}.items():
        file = package / "models" / "__init__.py" if name == "models" else package / f"{name}.py"
        file.write_text(textwrap.dedent(text))


def run(folder: Path, script: str) -> subprocess.CompletedProcess:
    """Run a script that finds the packages of a folder before all others."""
    script = f"import sys\nsys.path[:0] = {[str(folder), str(BENCHMARKS)]!r}\n{textwrap.dedent(script)}"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


def assert_prints(folder: Path, script: str, expected: str) -> None:
    done = run(folder, script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == expected.split()


IMPORTED = """
    import vision, torch, torchvision, builtins
    found = sys.modules["torchvision.models"]
    print(builtins.imported, found is vision.models, found is torchvision.models)
    print(hasattr(torch.ops.torchvision, "nms"), hasattr(torch.ops.torchvision, "qnms"))
"""


def test_operators_that_torchvision_brings_are_not_defined_again(tmp_path):
    write_torchvision(tmp_path, first=DEFINED + COUNTED)
    called = "print(torch.ops.torchvision.nms(torch.zeros(3, 4), torch.zeros(3), 0.5).tolist() == [0, 1, 2])"
    assert_prints(tmp_path, IMPORTED + f"    {called}", "1 True True True True True")


def test_operators_are_not_defined_before_torchvision_had_its_turn(tmp_path):
    seen = "import torch, builtins\nbuiltins.seen = hasattr(torch.ops.torchvision, 'nms')"
    write_torchvision(tmp_path, first=seen + textwrap.dedent(DEFINED))
    assert_prints(tmp_path, "import vision, builtins\nprint(builtins.seen)", "False")


def test_operators_that_are_missing_are_defined_and_nothing_half_imported_stays(tmp_path):
    write_torchvision(tmp_path, models="from torchvision import first, registrations\nassert registrations.fake_nms")
    assert_prints(tmp_path, IMPORTED, "2 True True True True")
    plain = run(tmp_path, "import torchvision")
    assert "RuntimeError: operator torchvision::nms does not exist" in plain.stderr


def test_an_operator_is_missing_when_the_models_are_imported(tmp_path):
    write_torchvision(tmp_path, registrations="", models=REGISTRATIONS)
    assert_prints(tmp_path, IMPORTED, "2 True True True True")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise RuntimeError('torchvision was built for another PyTorch')", "built for another PyTorch"),
        ("import a_package_that_is_not_there", "No module named 'a_package_that_is_not_there'"),
        ("import torch\ntorch.library.register_fake('other::nms')(print)", "operator other::nms does not exist"),
    ],
)
def test_another_failure_is_raised_as_it_is_and_defines_nothing(text, message, tmp_path):
    write_torchvision(tmp_path, registrations=text)
    script = """
        import torch
        try:
            import vision
        except Exception as error:
            print(error, file=sys.stderr)
        print("vision" in sys.modules, hasattr(torch.ops.torchvision, "nms"))
    """
    done = run(tmp_path, script)
    assert message in done.stderr
    assert done.stdout.split() == ["False", "False"]


def test_a_failure_that_the_names_do_not_mend_is_raised(tmp_path):
    write_torchvision(tmp_path, registrations=REGISTRATIONS.replace("nms", "roi_align"))
    done = run(tmp_path, "import vision")
    assert done.returncode == 1
    assert "RuntimeError: operator torchvision::roi_align does not exist" in done.stderr


def test_the_models_are_whole_and_without_torchvision_the_import_names_it(tmp_path):
    assert_prints(tmp_path, "import vision\nprint(vision.models.resnet18().fc.out_features)", "1000")
    done = run(tmp_path, "sys.modules['torchvision'] = None\nimport vision")
    assert done.returncode == 1
    assert "torchvision" in done.stderr.splitlines()[-1]
