"""From a model to functional ``torch.fx`` graphs of ATen operations, with the model left as it was."""
