"""What gradient flow conserves, against long hand and against training."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dagpath

from networks import RandomNet


def test_a_residual_stream_has_one_quantity_per_channel():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.branch, self.head = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x):
            y = self.stem(x)
            return self.head(F.relu(y + self.branch(F.relu(y))))

    net = Net().double()
    found = dagpath.conserved_quantities(dagpath.trace(net, torch.zeros(1, 2, dtype=torch.float64)))
    stem, branch, head = ((layer.weight.detach() ** 2, layer.bias.detach() ** 2) for layer in net.children())
    into = stem[0].sum(1) + stem[1] + branch[0].sum(1) + branch[1]
    torch.testing.assert_close(found, into - branch[0].sum(0) - head[0].sum(0))


@settings(max_examples=20)
@given(st.integers(0, 2**31 - 1))
def test_the_incidence_matrix_sums_the_squares(seed):
    net = RandomNet(seed, 6).double()
    traced = dagpath.trace(net, net.example())
    squares = torch.cat([parameter.detach().reshape(-1) ** 2 for parameter in net.parameters()])
    torch.testing.assert_close(
        dagpath.conserved_quantities(traced), traced.graph.incidence().to_dense().T @ squares, rtol=1e-12, atol=1e-12
    )


def trained_drift(step: float) -> float:
    torch.manual_seed(0)
    net = nn.Sequential(
        *[nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.LeakyReLU(0.1)],
        *[nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)],
    ).double()
    x, y = torch.randn(16, 1, 6, 6, dtype=torch.float64), torch.randint(3, (16,))
    traced = dagpath.trace(net, x)
    before = dagpath.conserved_quantities(traced)
    optimizer = torch.optim.SGD(net.parameters(), lr=step)
    for _ in range(round(0.2 / step)):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return float((dagpath.conserved_quantities(traced) - before).abs().max())


def test_the_drift_under_gradient_descent_vanishes_with_the_step_size():
    coarse, fine = trained_drift(4e-3), trained_drift(1e-3)
    assert coarse < 1e-2
    assert coarse / fine == pytest.approx(4.0, rel=0.1)
