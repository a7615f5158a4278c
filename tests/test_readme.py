"""What the front pages and the documentation state is what is there, and what the committed results say."""

import json
import re
from pathlib import Path

import dagpath

ROOT = Path(__file__).parents[1]


def test_every_link_of_the_front_pages_leads_somewhere():
    for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        links = re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text())
        assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_the_citation_names_this_version():
    assert f"\nversion: {dagpath.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_block_of_code_is_run_or_only_installs_or_cites():
    run, shown = {"python", "console"}, {"sh", "bibtex"}
    front = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
    for page in front:
        opening = re.findall(r"^ *```(.*)$", page.read_text(), re.MULTILINE)[::2]
        assert set(opening) <= run | shown, page
    generated = {ROOT / "docs" / name for name in ("gallery", "_build")}
    pages = [page for page in (ROOT / "docs").rglob("*.rst") if generated.isdisjoint(page.parents)]
    assert len(pages) > 30
    for page in pages:
        text = page.read_text()
        languages = re.findall(r"^ *\.\. (?:code-block|code|sourcecode|highlight)::(.*)$", text, re.MULTILINE)
        assert {language.strip() for language in languages} <= run | shown, page
        assert not re.search(r"^(?! *\.\. ).*::\n\n", text, re.MULTILINE), page  # a literal block without a language
        assert ".. parsed-literal::" not in text, page
        included = re.findall(r"^ *\.\. literalinclude:: (.*)$", text, re.MULTILINE)
        assert all((page.parent / name).resolve().parent == ROOT / "examples" for name in included), page  # also run


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


def test_the_reasons_that_the_documentation_explains_are_those_that_the_rules_give():
    page = (ROOT / "docs/howto/fixed_neurons.rst").read_text()
    rules = "".join(path.read_text() for path in (ROOT / "dagpath").rglob("*.py"))
    reasons = re.findall(r"^   \* - (.+)$", page, re.MULTILINE)[1:]
    assert len(reasons) > 5
    for reason in reasons:
        for part in reason.split("; "):
            assert f'"{part}"' in rules or part.startswith("tied by"), part


def test_the_versions_that_are_promised_are_the_oldest_and_the_pinned_ones_that_were_tested():
    page, project = ((ROOT / name).read_text() for name in ("docs/start/installation.rst", "pyproject.toml"))
    tested = [row.split("\n     - ") for row in re.findall(r"   \* - (\d.*(?:\n     - \d.*)+)", page)]
    bounds = ('"torch>=', 'requires-python = ">=', '"numpy>=', '"scipy>=', '"networkx>=')
    promised = [re.search(rf"{bound}([\d.]+)", project)[1] for bound in bounds]
    assert len(tested) > 1
    assert all(f"{found}.".startswith(f"{least}.") for found, least in zip(tested[0], promised, strict=True))
    assert set(re.findall(r"Python :: (3\.\d+)", project)) == {python for _, python, *_ in tested}
    pinned = re.search(r"torch==(.*)", (ROOT / "constraints.txt").read_text())[1]
    assert pinned in {torch for torch, *_ in tested}
