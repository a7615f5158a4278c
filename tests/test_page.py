"""The report page shows what the trace holds, in one file."""

import itertools
import math
import re
from collections import Counter
from decimal import Decimal
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from torch import nn

import dagpath
from dagpath.page.page import ROW, _axis, _drawing, _lanes, _rows, html_report

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
        self.stem, self.block = nn.Linear(3, 4), nn.Linear(4, 4)
        self.middle, self.head = nn.Linear(4, 5), nn.Linear(5, 2)
        self.add_module("<gate & co>", nn.Linear(4, 4))

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + torch.relu(self.block(x))
        x = torch.relu(x * torch.sigmoid(self.get_submodule("<gate & co>")(x)))
        return self.head(torch.relu(self.middle(x)))


@pytest.fixture
def traced():
    """Free, tied and fixed neurons, and factors far apart."""
    torch.manual_seed(0)
    net = Residual().double()
    with torch.no_grad():
        net.stem.weight[0].mul_(64)
        net.block.weight.mul_(8)
    return dagpath.trace(net, torch.zeros(1, 3).double())


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


def test_rows_are_what_the_graph_and_the_rescaling_hold(traced):
    graph, found = traced.graph, dagpath.random_rescaling(traced, generator=torch.Generator().manual_seed(1))
    masses = dagpath.path_mass(traced)
    members = Counter(graph.group_of.tolist())
    rows = {row.name: row for row in _rows(found, graph.to_networkx(mass=masses)) if row.role == "hidden"}
    assert len(rows) == len(graph.sites) == 5
    for index, site in enumerate(graph.sites):
        row, own = rows[site.module], graph.maker_of == index
        groups = graph.group_of[own].tolist()
        free = [group for group in groups if group > 0]
        assert (row.size, row.free) == (len(groups), len(free))
        assert row.tied == sum(members[group] > 1 for group in free)
        assert row.mass == pytest.approx(float(masses[own].sum()), rel=1e-12)
        reasons = [graph.causes[cause].reason for cause in graph.cause_of[own].tolist() if cause >= 0]
        assert row.reasons == tuple(dict.fromkeys(reasons))
        if free:
            factors = np.log2([math.exp(found.log_scales[group - 1]) for group in free])
            assert row.factors == pytest.approx(np.quantile(factors, [0, 0.25, 0.5, 0.75, 1]).tolist(), abs=1e-12)
    assert sum(row.tied for row in rows.values()) > 0
    assert len({row.factors for row in rows.values()}) > 2
    assert _axis(rows.values()) == pytest.approx(float(found.log_scales.abs().max()) / math.log(2))


def test_bars_and_boxes_are_as_long_as_the_numbers(traced):
    found = dagpath.random_rescaling(traced, generator=torch.Generator().manual_seed(1))
    page = html_report(traced, found)
    rows = list(_rows(found, traced.graph.to_networkx(mass=dagpath.path_mass(traced))))
    axis = _axis(rows)
    drawn = re.findall(r'class="(\w+)"( x="[^"]+")?( y="2")? width="([^"]+)"', page.partition("<tbody>")[2])
    widths = {
        kind: [float(width) for name, _, _, width in drawn if name == kind] for kind in ("free", "tied", "mass", "box")
    }
    hidden = [row for row in rows if row.size]
    assert widths["free"] == pytest.approx([100 * (row.free - row.tied) / row.size for row in hidden])
    assert widths["tied"] == pytest.approx([100 * row.free / row.size for row in hidden])
    assert widths["mass"] == pytest.approx([100 * row.mass for row in hidden])
    free = [row for row in hidden if row.factors]
    assert widths["box"] == pytest.approx([48 * (row.factors[3] - row.factors[1]) / axis for row in free])
    ends = re.findall(r'class="range" d="M(\S+) 6H([^"]+)"', page)
    expected = [(50 + 48 * row.factors[0] / axis, 50 + 48 * row.factors[4] / axis) for row in free]
    assert [tuple(map(float, pair)) for pair in ends] == [pytest.approx(pair) for pair in expected]


def test_the_page_says_what_is_fixed_and_where(traced):
    page = html_report(traced)
    found = dagpath.balance(traced)
    assert f"{found.objective[0]:,.1f}" in page
    assert f"{found.objective[1]:,.1f}" in page
    assert f"{dagpath.path_count(traced):,}" in page
    for cause in traced.explain("dict")["causes"]:
        assert cause["reason"] in page
        assert cause["source"].partition(" (")[0] in page


def test_counts_of_any_size_are_shown():
    net = nn.Sequential(*(layer for _ in range(40) for layer in (nn.Linear(9, 9), nn.ReLU())))
    traced = dagpath.trace(net, torch.zeros(1, 9))
    mantissa, exponent = f"{Decimal(dagpath.path_count(traced)):.2e}".split("e+")
    assert f"{mantissa} · 10^{exponent}" in html_report(traced)


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


def test_lines_lead_from_row_to_row(traced):
    layers = traced.graph.to_networkx()
    layers.remove_node("(1)")
    lines, width = _drawing(layers)
    names = list(layers)
    ends = []
    for line in lines:
        numbers = [float(number) for number in re.findall(r"-?[\d.]+", line)]
        assert numbers[0] == width - 8
        ends.append((names[int(numbers[1] // ROW)], names[int(numbers[-1] // ROW)]))
    assert sorted(ends) == sorted(layers.edges)


def test_no_two_arcs_lie_on_each_other():
    arcs = [(0, 3), (1, 4), (3, 7), (0, 9), (2, 5), (5, 9), (6, 8)]
    lanes = _lanes(arcs)
    assert lanes[0] == lanes[2]  # one begins where the other ends
    assert max(lanes) == 3  # four arcs pass between rows 2 and 3
    for lane in set(lanes):
        spans = sorted(arc for arc, own in zip(arcs, lanes, strict=True) if own == lane)
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))
