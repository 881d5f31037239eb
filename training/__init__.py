"""The training room: the two-stage recipe, synthetic data, demo models; may import torch."""
