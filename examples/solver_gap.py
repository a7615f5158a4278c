"""
How far from the optimum does coordinate descent stop?
======================================================

The published algorithm of path conditioning minimizes over one neuron after the other, a number of sweeps over all
of them. dagpath's default is Newton's method. Both minimize the same convex criterion F, and both are one option of
:func:`dagpath.balance`: how large is the gap F − F* that each leaves?
"""

# %%
# Two networks without normalization: a multilayer perceptron, and a small convolutional network.
import warnings

import torch
from matplotlib import pyplot as plt

import dagpath
from dagpath import plots, study

torch.manual_seed(0)
networks = {
    "MLP": (study.mlp(64, 256, 128, 64, 32, 10), torch.zeros(1, 64)),
    "CNN": (study.cnn(1, 32, 64, 32, 64, 32), torch.zeros(1, 1, 16, 16)),
}


# %%
# The gap per live parameter after so many sweeps or Newton steps; F* is where Newton's method stops at a tolerance
# near rounding. The rescaling of every step is valid, so a warning that it is not optimal is expected.
def gaps(traced, solver, counts):
    best = dagpath.balance(traced, tol=1e-12)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for count in counts:
            rescaling = dagpath.balance(traced, solver=solver, tol=1e-12, max_iter=count)
            error = (rescaling.log_scales - best.log_scales).abs().max()
            found.append(((rescaling.objective[1] - best.objective[1]) / best.live, float(error)))
            if rescaling.converged:
                break
    return found


counts = [1, 2, 3, 5, 7, 10, 20, 30, 50, 100, 200, 300]
results = {}
for name, (model, x) in networks.items():
    traced = dagpath.trace(model, x)
    for solver, numbers in (("newton", range(1, 20)), ("coordinate", counts)):
        results[name, solver] = list(zip(numbers, gaps(traced, solver, numbers), strict=False))
    for solver, shown in (("newton", (1,)), ("coordinate", (1, 10, 100, 300))):
        for count, (gap, error) in results[name, solver]:
            if count in shown:
                print(f"{name}, {solver:10} after {count:3}: gap {gap:.0e}, largest error of log λ {error:.0e}")
    print(f"{name}, newton     is done after {results[name, 'newton'][-1][0]}")

# %%
# A gap that is zero but for rounding is drawn at the lower edge. What a step and a sweep cost is another question,
# which :doc:`/benchmarks/index` answers.
floor = 1e-15
_, ax = plt.subplots(figsize=(5.2, 3.8), layout="constrained")
styles = {"MLP": (plots.BLUE, "o"), "CNN": (plots.ORANGE, "^")}
for (name, solver), points in results.items():
    color, marker = styles[name]
    line, label = ("-", "sweeps") if solver == "coordinate" else (":", "Newton")
    values = [max(gap, floor) for _, (gap, _) in points]
    ax.plot([count for count, _ in points], values, line, color=color, marker=marker, label=f"{name}, {label}")
ax.set(xscale="log", yscale="log", xlabel="Newton steps, or sweeps", ylabel="(F − F*) per parameter")
ax.legend()
plt.show()

# %%
# **After ten sweeps it is much farther from the optimum than Newton's method after its first step.** A sweep moves
# one neuron at a time, so that what one layer does travels to the others sweep by sweep. How many sweeps are enough
# depends on the network; the optimality that :meth:`dagpath.Rescaling.summary` prints says whether they were.
