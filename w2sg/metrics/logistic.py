"""Logistic regression on one variable, for many weightings of the same rows at once, as a bootstrap asks for it."""

from __future__ import annotations

import numpy as np

RIDGE = 1e-6  # times half the squared coefficients, beside the mean log loss
STEPS = 500  # of Newton, at most; ten are usual, under a hundred are taken where the data are separable
TOLD_APART = 4e-4  # of a variance over a squared mean: at 100 times the ridge the data decide, not the ridge


def slope_told_apart(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[r] whether x [N] varies enough, under weights [r, N], to tell its slope from the intercept."""
    mean, square = (weights @ np.stack([x, x * x], 1)).T
    return square - mean**2 >= TOLD_APART * mean**2


def logistic_fits(x: np.ndarray, y: np.ndarray, weights: np.ndarray, start: np.ndarray) -> np.ndarray:
    """[r, 2] intercept and slope of y [N] in [0, 1] on x [N] in [-1, 1], for each row of weights [r, N] of sum 1.

    Newton's method, its step shortened to log(1 + s) / s, where s bounds the change of any logit: the logistic loss
    then falls at every step (Bach 2010, "Self-concordant analysis for logistic regression", arXiv 0910.4627), where
    plain Newton can diverge.
    """
    from scipy.special import expit

    powers = np.stack([np.ones_like(x), x, x * x], 1)
    weights = weights.astype(np.float64)
    fits = np.tile(start, (len(weights), 1))
    active = np.arange(len(weights))
    for _ in range(STEPS):
        beta, w = fits[active], weights[active]
        p = expit(beta[:, :1] + beta[:, 1:] * x)
        g = (w * (y - p)) @ powers[:, :2] - RIDGE * beta
        # the Hessian [[h0, h1], [h1, h2]] of each row, inverted by hand: two unknowns need no solver
        h0, h1, h2 = ((w * (p * (1 - p))) @ powers).T
        h0, h2 = h0 + RIDGE, h2 + RIDGE
        step = np.stack([h2 * g[:, 0] - h1 * g[:, 1], h0 * g[:, 1] - h1 * g[:, 0]], 1) / (h0 * h2 - h1 * h1)[:, None]
        size = np.abs(step).sum(1)
        fits[active] = beta + step * (np.log1p(size) / np.maximum(size, 1e-300))[:, None]
        active = active[size > 1e-7]
        if not len(active):
            break
    return fits
