"""Measures of labels by an independent implementation."""

import numpy as np
import torch


def reference():
    """64 examples by formula: teacher and student logits of a known truth (independent numbers below)."""
    i = np.arange(64)
    h = np.stack([np.sin(0.7 * (i + 1)), np.cos(1.1 * (i + 1)), np.sin(0.37 * (i + 1) ** 1.5)], 1)
    truth = h @ np.array([2.0, -1.0, 1.5])
    weak = 0.7 * truth + 0.9 * np.cos(1.3 * i)
    student = 1.2 * truth + 0.4 * np.sin(2.1 * i)
    labels = torch.tensor((truth <= 0).astype(int))  # class 0 is the positive one
    return [torch.tensor(np.stack([z, np.zeros(64)], 1)) for z in (weak, student)], labels
