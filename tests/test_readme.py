"""What the README states is what the committed results say."""

import json
import re
import statistics
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_figures_of_the_readme_are_those_of_the_result_file():
    figures = json.loads((ROOT / "benchmarks/results/rescale.json").read_text())["figures"]
    shown = re.findall(r"^\| .+ \| ([\d.]+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    names = [
        *(
            "rescale_ / pass",
            "  trace / pass",
            "  masses / pass",
            "  solve / pass",
            "  apply / pass",
            "  verify / pass",
        ),
        *("peak memory / parameter bytes", "plain coordinate descent, 10 sweeps / newton"),
        "dagpath's coordinate solver, 10 sweeps / newton",
    ]
    for text, name in zip(shown, names, strict=True):
        digits = len(text.partition(".")[2])
        assert text == f"{figures[name]:.{digits}f}", name


@pytest.mark.parametrize(
    ("file", "pattern"),
    [("README.md", r"```python\n(.*?)```"), ("docs/index.rst", r"code-block:: python\n\n(.*?)\n\n\S")],
)
def test_the_first_code_block_runs(file, pattern):
    block = re.search(pattern, (ROOT / file).read_text(), re.DOTALL)
    assert block is not None
    code = textwrap.dedent(block.group(1)).replace("resnet50", "resnet18").replace("224", "64")
    scope: dict = {}
    exec(code, scope)
    assert "criterion after" in scope["rescaling"].summary()


def test_all_code_of_the_page_on_the_solver_is_run():
    text = (ROOT / "docs/understand/newton.rst").read_text()
    assert ">>> " in text
    assert not re.search(r"code-block|::\n\n", text.replace(".. math::\n\n", ""))


def test_the_losses_in_the_documentation_are_those_of_the_result_file():
    losses = json.loads((ROOT / "benchmarks/results/train.json").read_text())["figures"]["losses"]
    text = (ROOT / "docs/benchmarks/training.rst").read_text()
    rows = {
        "SGD": "SGD",
        "GSGD, ``skeleton=0.5``": "GSGD, 0.5",
        'GSGD, ``skeleton="ones"``': "GSGD, 1",
        'GSGD, ``skeleton="heaviest"``': "GSGD, heaviest",
        "PathSGD, ``every=10``": "PathSGD, every 10",
        "SGD from the start of GSGD at 0.5": "SGD from the start of GSGD, 0.5",
        "SGD from the start of GSGD at 1": "SGD from the start of GSGD, 1",
    }
    for label, method in rows.items():
        shown = re.search(rf"^{re.escape(label)} +(\S+) (\S+)$", text, re.MULTILINE)
        assert shown is not None, label
        found = [statistics.median(losses[f"{network}, {method}"]["losses"]) for network in ("MLP", "CNN")]
        assert [f"{loss:.2e}" for loss in found] == list(shown.groups()), label


def test_what_the_documentation_says_of_single_runs_is_in_the_result_file():
    figures = json.loads((ROOT / "benchmarks/results/train.json").read_text())["figures"]["losses"]
    losses = {name: figure["losses"] for name, figure in figures.items()}

    def wins(network: str, method: str, other: str) -> int:
        pairs = zip(losses[f"{network}, {method}"], losses[f"{network}, {other}"], strict=True)
        return sum(own < others for own, others in pairs)

    cases = [(network, start) for network in ("MLP", "CNN") for start in ("1", "0.5")]
    same_start = sum(wins(net, f"GSGD, {start}", f"SGD from the start of GSGD, {start}") for net, start in cases)
    assert (same_start, wins("MLP", "GSGD, 0.5", "SGD"), wins("CNN", "GSGD, 0.5", "SGD")) == (15, 5, 2)
    text = (ROOT / "docs/benchmarks/training.rst").read_text()
    assert "end lower in 15 of the 20 runs" in text
    assert "with all five on the MLP, with two on the CNN" in text


def test_the_reasons_that_the_documentation_explains_are_those_that_the_rules_give():
    page = (ROOT / "docs/howto/fixed_neurons.rst").read_text()
    rules = "".join(path.read_text() for path in (ROOT / "dagpath").rglob("*.py"))
    reasons = re.findall(r"^   \* - (.+)$", page, re.MULTILINE)[1:]
    assert len(reasons) > 5
    for reason in reasons:
        for part in reason.split("; "):
            assert f'"{part}"' in rules or part.startswith("tied by"), part
