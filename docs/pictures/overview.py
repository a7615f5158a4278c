"""What dagpath finds: the factors of a ResNet-18, and the spectrum of a path Gram matrix before and after.

python docs/pictures/overview.py docs/static/overview.png     writes the picture of the README
"""

import sys

import torch
from matplotlib import pyplot as plt
from torchvision.models import resnet18

import dagpath
from dagpath import plots, study

torch.manual_seed(0)
plt.rcParams["font.size"] = 9  # as in all pictures of the site
_, (left, right) = plt.subplots(1, 2, figsize=(8.0, 3.6), layout="constrained")

model = resnet18().eval()
plots.scale_factors(dagpath.balance(dagpath.trace(model, torch.zeros(1, 3, 224, 224))), left)
left.set_title("ResNet-18: the factors of each layer", fontsize=10)

traced = dagpath.trace(study.mlp(16, 48, 12, 6, 4), torch.zeros(1, 16))
plots.gram_spectrum(traced, dagpath.balance(traced), right)
right.set_title("a perceptron: path Gram matrix", fontsize=10)

if __name__ == "__main__" and len(sys.argv) > 1:  # a page draws it without
    plt.savefig(sys.argv[1], dpi=150)
