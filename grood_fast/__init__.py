"""Out-of-distribution scores for PyTorch classifiers, from their gradients."""
