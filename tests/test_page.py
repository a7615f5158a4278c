"""The report page shows what the trace holds, in one file."""

import itertools
import re
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import dagpath
from dagpath.page import _drawing, _lanes, html_report

from networks import mlp


class Reader(HTMLParser):
    """Tags, attributes, and the text of each cell of the table of layers."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.add_module("<gate & co>", nn.Linear(4, 4))

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + torch.relu(self.block(x))
        return self.head(torch.relu(x * torch.sigmoid(self.get_submodule("<gate & co>")(x))))


@pytest.fixture
def traced():
    torch.manual_seed(0)
    return dagpath.trace(Residual().double(), torch.zeros(1, 3).double())


def test_the_page_is_well_formed_and_needs_nothing_else(traced):
    page = html_report(traced)
    reader = Reader(page)
    assert reader.open == []
    assert not {"script", "link", "img", "iframe"} & set(reader.tags)
    assert not [value for _, name, value in reader.attributes if name in ("src", "href", "xlink:href")]
    assert "url(" not in page
    assert "@import" not in page


def test_names_are_escaped(traced):
    page = html_report(traced)
    assert "<gate" not in page
    assert "&lt;gate &amp; co&gt;" in page


def test_the_page_holds_masses_factors_and_reasons(traced):
    page = html_report(traced)
    layers = traced.graph.to_networkx(mass=dagpath.path_mass(traced))
    found = dagpath.balance(traced)
    for data in dict(layers.nodes(data=True)).values():
        if data["role"] == "hidden":
            assert f'aria-label="share {data["mass"]:.3g}"' in page
    medians = re.findall(r'aria-label="log2 of the factors: \S+, median (\S+), ', page)
    expected = [z.quantile(0.5) / torch.tensor(2.0).log() for _, z in found.layers()]
    assert [float(value) for value in medians] == pytest.approx(
        [float(value) for value in expected], rel=1e-2, abs=1e-3
    )
    assert f"{found.objective[0]:,.1f}" in page
    assert f"{found.objective[1]:,.1f}" in page
    for cause in traced.explain("dict")["causes"]:
        assert cause["reason"] in page
        assert cause["source"].partition(" (")[0] in page
    states = re.findall(r'aria-label="(\d+) free, (\d+) tied, (\d+) fixed"', page)
    counts = [sum(int(state[kind]) for state in states) for kind in range(3)]
    assert counts[0] + counts[1] == int((traced.graph.group_of > 0).sum())
    assert counts[2] == int((traced.graph.group_of == 0).sum())


def test_a_rescaling_of_ones_own_is_shown(traced):
    found = dagpath.balance(traced, "equinorm")
    assert f"{found.objective[0]:,.1f}" in html_report(traced, found)
    assert "nan" not in html_report(traced, dagpath.random_rescaling(traced)).partition("<body>")[2]
    with pytest.raises(ValueError, match="another trace"):
        html_report(traced, dagpath.balance(dagpath.trace(traced.model, torch.zeros(1, 3).double())))


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        net = mlp(4, 8, 2)
    with pytest.raises(ValueError, match=r"'0\.weight' is on the meta device"):
        html_report(dagpath.trace(net, torch.zeros(1, 4)))


def test_weights_that_are_not_finite_are_refused():
    net = mlp(4, 8, 2)
    with torch.no_grad():
        net[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"0\.weight"):
        html_report(dagpath.trace(net, torch.zeros(1, 4)))


def test_every_edge_is_drawn_and_no_two_arcs_lie_on_each_other(traced):
    layers = traced.graph.to_networkx()
    layers.remove_node("(1)")
    lines, _ = _drawing(layers)
    assert len(lines) == layers.number_of_edges()
    arcs = [(0, 3), (1, 4), (3, 7), (0, 9), (2, 5), (5, 9)]
    lanes = _lanes(arcs)
    for lane in set(lanes):
        spans = sorted(arc for arc, own in zip(arcs, lanes, strict=True) if own == lane)
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))
