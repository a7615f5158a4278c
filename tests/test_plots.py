"""Pictures show the numbers that they claim to show."""

import math

import matplotlib as mpl
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dagpath

mpl.use("agg")

from matplotlib.axes import Axes

from dagpath import plots


class Residual(nn.Module):
    """Three residual blocks between a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = x + torch.relu(block(x))
        return self.head(x)


@pytest.fixture
def traced() -> dagpath.TracedModel:
    return dagpath.trace(Residual().double(), torch.zeros(1, 3, dtype=torch.float64))


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    mpl.pyplot.close("all")


def test_bars_of_lengths_are_counts_and_shares(traced):
    counts = dagpath.path_length_profile(traced)
    bars = plots.path_length_profile(traced).patches
    assert [bar.get_height() for bar in bars] == [math.log10(count) for count in counts.values()]
    bars = plots.path_length_profile(traced, p=2).patches
    assert sum(bar.get_height() for bar in bars) == pytest.approx(1)


def test_bars_of_layers_are_their_shares_of_the_mass(traced):
    widths = [bar.get_width() for bar in plots.mass_per_layer(traced).patches]
    assert len(widths) == 5
    assert widths[-1] == pytest.approx(1)  # every path ends in the head
    assert 0 < widths[0] < 1  # biases start behind the stem


def test_boxes_show_the_factors_of_every_layer(traced):
    rescaling = dagpath.random_rescaling(traced, 1.0, generator=torch.Generator().manual_seed(0))
    ax = plots.scale_factors(rescaling)
    ends = np.concatenate([segments[:, 0] for lines in ax.collections for segments in lines.get_segments()])
    exponents = rescaling.log_scales / math.log(2)
    assert (ends.min(), ends.max()) == pytest.approx((float(exponents.min()), float(exponents.max())))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["stem", "blocks.0", "blocks.1", "blocks.2"]


def test_the_spectrum_after_is_that_of_the_rescaled_model(traced):
    rescaling = dagpath.balance(traced)
    before, after = (line.get_ydata() for line in plots.gram_spectrum(traced, rescaling).lines)
    rescaling.apply_()
    np.testing.assert_allclose(plots.gram_spectrum(traced).lines[0].get_ydata(), after, rtol=1e-6)
    assert not np.allclose(before, after, rtol=1e-3)
    other = dagpath.trace(Residual().double(), torch.zeros(1, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="another trace"):
        plots.gram_spectrum(other, rescaling)


def test_every_picture_draws_into_the_axes_it_is_given(traced):
    rescaling = dagpath.balance(traced)
    draw = [
        lambda ax: plots.path_length_profile(traced, ax=ax),
        lambda ax: plots.mass_per_layer(traced, ax=ax),
        lambda ax: plots.scale_factors(rescaling, ax=ax),
        lambda ax: plots.gram_spectrum(traced, ax=ax),
        lambda ax: plots.layer_graph(traced, ax=ax),
    ]
    for function in draw:
        ax = mpl.pyplot.figure().add_subplot()
        assert function(ax) is ax
        assert isinstance(function(None), Axes)
        ax.figure.canvas.draw()


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Linear(2, 2, bias=False)])
def test_networks_without_parameters_or_without_mass_have_pictures(model):
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    traced = dagpath.trace(model, torch.zeros(1, 2))
    for draw in (plots.path_length_profile, plots.mass_per_layer, plots.gram_spectrum, plots.layer_graph):
        ax = draw(traced)
        assert isinstance(ax, Axes)
        ax.figure.canvas.draw()
