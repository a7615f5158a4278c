"""
How do I teach dagpath an operation of my own?
==============================================

A model may call an operation that dagpath has no rule for, such as one made with :func:`torch.library.custom_op`.
The neurons that it touches are then fixed, and no path goes through it. A rule says how neurons and paths go through
it; :doc:`/howto/own_operation` explains its two methods line by line.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dagpath
from dagpath.ops import Call, Gate, NeuronFlow, Operand, Operation, PathFlow, Weight


@torch.library.custom_op("dagpath_examples::peak", mutates_args=())
def peak(x: Tensor, gain: Tensor) -> Tensor:
    """The largest entry of every channel, times the gain of the channel: [n, c, positions], [c] -> [n, c]."""
    return gain * x.amax(2)


@peak.register_fake
def _(x: Tensor, gain: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2])


class Peak(nn.Module):
    """A layer of that operation, with a learnable gain per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        return peak(x, self.gain)


class PeakRule(Operation):
    """One new neuron per channel, fed by all positions of the channel through its gain."""

    def neurons(self, flow: NeuronFlow, call: Call) -> Tensor:
        x, gain = flow.activation(call["x"]), call["gain"]
        if not isinstance(gain, Weight):
            raise ValueError("its gain is no parameter")  # what this call touches is fixed, and explain() says so
        sources = flow.per_channel(x, 1, "a maximum")  # the positions of a channel share a scale
        neurons = flow.fresh(len(sources), gain)
        flow.use(gain, dst=neurons, src=sources)
        return neurons.expand(call.output.shape)

    def paths(self, flow: PathFlow, call: Call) -> Operand:
        shape = call.output.shape
        peaks = flow.reduced(call["x"], shape, lambda x: x, gate=Gate(self.is_peak))  # a path through every position
        return flow.product(shape, peaks, call["gain"])

    @staticmethod
    def is_peak(real: Call) -> Tensor:
        """1 at the position of each channel that counts for this input: the same shape as x."""
        x = real["x"]
        return torch.nn.functional.one_hot(x.argmax(2), x.shape[2])


dagpath.register_op(peak, PeakRule())

# %%
# A rule that is wrong would change the function of a model. So it is checked: factors that are powers of two pass
# every floating-point operation unchanged, and path-norms do not depend on the scale of neurons.


def main() -> dagpath.TracedModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 8, 3), nn.ReLU(), Peak(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(5, 2, 20)
    traced = dagpath.trace(model, x)
    print(traced.explain())

    with torch.no_grad():
        outputs, norm = model(x), dagpath.path_norm(traced)
        dagpath.random_rescaling(traced, sigma=3.0, power_of_two=True).apply_()
        print("\nafter a random rescaling")
        print("outputs are bitwise equal:", torch.equal(model(x), outputs))
        print(f"path-norm: {norm:.6f} before, {dagpath.path_norm(traced):.6f} after")
    return traced


if __name__ == "__main__":
    traced = main()

# %%
# **With one class of two methods, and one call.** The layer of the operation is now one like all others: its neurons
# are free, and balancing finds factors for the channels before it and after it. (The random rescaling from above is
# undone with them, which is why they are large.)
if __name__ == "__main__":
    from matplotlib import pyplot as plt

    from dagpath import plots

    ax = plt.subplots(figsize=(5.2, 2.4), layout="constrained")[1]
    plots.scale_factors(dagpath.balance(traced), ax)
    ax.set_yticks([0, 1], ["Conv1d", "Peak"], fontsize=10)
    plt.show()
