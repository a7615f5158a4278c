"""
What does path conditioning do to the spectrum of the path Gram matrix?
=======================================================================

Path conditioning finds the rescaling after which the *diagonal* of the path Gram matrix G = ∂Φᵀ∂Φ is as even as it
can be, in the sense of a log-det divergence. Is the whole spectrum better conditioned then? G has the nonzero
eigenvalues of the path kernel, the part of the neural tangent kernel that knows of no data.
"""

# %%
# A convolutional network so small that G fits in memory and its eigenvalues can be computed.
import torch
from matplotlib import pyplot as plt

import dagpath
from dagpath import plots, study

torch.manual_seed(0)
model = study.cnn(1, 8, 4, 6).double()
image = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
print(dagpath.balance(dagpath.trace(model, image)).summary())

# %%
# One draw of the weights may be an exception. So these are the condition numbers (largest over smallest nonzero
# eigenvalue) of four draws at each of two initializations: PyTorch's own, and that of He et al., with biases of zero.
for scheme in ("default", "kaiming"):
    ratios = []
    for seed in range(4):
        traced = dagpath.trace(study.initialize_(model, scheme, seed=seed), image)
        before = dagpath.gram(traced).condition_number()
        dagpath.balance(traced).apply_()
        ratios.append(dagpath.gram(traced).condition_number() / before)
    factors = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"{scheme}: condition number after over before, draw by draw: {factors}")
    print(f"{scheme}: better conditioned in {sum(ratio < 1 for ratio in ratios)} of {len(ratios)} draws")

# %%
# The spectra of the first draws. Zero eigenvalues are left out: there is one along each rescaling.
_, axes = plt.subplots(2, figsize=(5.2, 5.4), layout="constrained")
for ax, scheme in zip(axes, ("default", "kaiming"), strict=True):
    traced = dagpath.trace(study.initialize_(model, scheme, seed=0), image)
    plots.gram_spectrum(traced, dagpath.balance(traced), ax)
    ax.set_title(f"{scheme} initialization")
axes[0].set_xlabel("")
plt.show()

# %%
# **The criterion always falls, the condition number need not.** Path conditioning sees the diagonal alone, and weighs
# the arithmetic mean of its entries against their geometric mean; a condition number is made of the two ends of the
# spectrum. Whether they come closer depends on the initialization, as the printed factors show.
# :func:`dagpath.plots.gram_spectrum` draws this picture for any model of up to 20,000 parameters.
