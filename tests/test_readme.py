"""What the README states is what the committed results say."""

import json
import re
from pathlib import Path

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


def test_all_code_of_the_page_on_the_solver_is_run():
    text = (ROOT / "docs/understand/newton.rst").read_text()
    assert ">>> " in text
    assert not re.search(r"code-block|::\n\n", text.replace(".. math::\n\n", ""))


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
    rates = [figures[f"{network}, GSGD, heaviest"]["learning rate"] for network in ("MLP", "CNN")]
    assert 'of ``"heaviest"`` are {:.1e}\n(MLP) and {:.1e} (CNN)'.format(*rates) in text
