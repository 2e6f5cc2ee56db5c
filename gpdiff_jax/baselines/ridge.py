"""In: prompts and what is to be predicted from them, city by city. Out: weighted ridge regression, and its penalty.

Hoerl and Kennard, "Ridge Regression", Technometrics 12, 1970.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from gpdiff_jax.data.sources import city_weights
from gpdiff_jax.prompts.prompt import in_scale, scale_of

PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_FOLDS = 5  # into which the regions of an only city fall


def fold_of_region(city_index: Int[np.ndarray, " R"]) -> Int[np.ndarray, " R"]:
    """What is left out together with every region: its city, or, where there is one city only, one fifth of it."""
    return city_index if len(np.unique(city_index)) > 1 else np.arange(len(city_index)) % _FOLDS


def solve_ridge(
    prompts: Float[np.ndarray, "V R E"],
    targets: Float[np.ndarray, "R X"],
    weights: Float[np.ndarray, " R"],
    penalty: float,
) -> Float[np.ndarray, "E1 X"]:
    """Weighted ridge regression with a free intercept; every variant of a prompt has the same target.

    Args:
      prompts: scaled.
      targets: what is to be predicted for each region.
      weights: of the regions.
      penalty: on the mean square, so that it means the same for any number of regions.

    Returns:
      Slopes, and the intercept as the last row.
    """
    return _solve(*_moments(prompts, targets, weights), penalty)


def apply_ridge(solution: Float[np.ndarray, "E1 X"], prompts: Float[np.ndarray, "R E"]) -> Float[np.ndarray, "R X"]:
    """What a solution of `solve_ridge` predicts from scaled prompts."""
    return prompts @ solution[:-1] + solution[-1]


def choose_penalty(
    prompts: Float[np.ndarray, "V R E"],
    targets: Float[np.ndarray, "R X"],
    city_index: Int[np.ndarray, " R"],
    penalties: Sequence[float] = PENALTIES,
) -> float:
    """The penalty with the lowest squared error on cities left out in turn, seen through their first variant.

    A city that is left out does not scale the prompts either.

    Args:
      prompts: unscaled.
      targets: what is to be predicted for each region.
      city_index: the city of every region; of an only city, regions are left out in five folds.
      penalties: to choose from.

    Returns:
      One of them.
    """
    weights, fold = city_weights(city_index), fold_of_region(city_index)
    errors = dict.fromkeys(penalties, 0.0)
    for left_out in np.unique(fold):
        rows = fold != left_out
        if not rows.any():
            continue
        scaled = in_scale(prompts, scale_of(prompts[:, rows], city_index[rows])).astype(np.float64)
        moments = _moments(scaled[:, rows], targets[rows], weights[rows])
        for penalty in penalties:
            predicted = apply_ridge(_solve(*moments, penalty), scaled[0, ~rows])
            error = np.square(predicted - targets[~rows]).sum(axis=1)
            errors[penalty] += float((error * weights[~rows]).sum())
    return min(errors, key=lambda penalty: errors[penalty])


def _moments(
    prompts: Float[np.ndarray, "V R E"], targets: Float[np.ndarray, "R X"], weights: Float[np.ndarray, " R"]
) -> tuple[Float[np.ndarray, "E1 E1"], Float[np.ndarray, "E1 X"]]:
    """Weighted means of the products of prompts, and a last column of ones, with themselves and with the targets."""
    variants, regions, _ = prompts.shape
    features = np.concatenate([prompts, np.ones((variants, regions, 1))], axis=2)
    share = weights / (weights.sum() * variants)
    gram = np.einsum("vre,vrf,r->ef", features, features, share, optimize=True)
    return gram, np.einsum("vre,r->er", features, share) @ targets


def _solve(
    gram: Float[np.ndarray, "E1 E1"], moments: Float[np.ndarray, "E1 X"], penalty: float
) -> Float[np.ndarray, "E1 X"]:
    """Everything is penalised but the intercept."""
    penalties = np.full(len(gram), penalty)
    penalties[-1] = 0.0
    return np.linalg.solve(gram + np.diag(penalties), moments)
