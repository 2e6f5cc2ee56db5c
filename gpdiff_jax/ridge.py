"""In: prompts and what is to be told from them, city by city. Out: weighted ridge regression, and its penalty.

Hoerl and Kennard, "Ridge Regression", Technometrics 12, 1970.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_TURNS = 5  # in which the regions of an only city are left out


def city_weights(city_index: Int[np.ndarray, " R"]) -> Float[np.ndarray, " R"]:
    """A weight for every region that lets every city weigh the same."""
    return 1.0 / np.bincount(city_index)[city_index]


def left_out_in_turn(city_index: Int[np.ndarray, " R"]) -> Int[np.ndarray, " R"]:
    """What is left out together with every region: its city, or, where there is one city only, one fifth of it."""
    return city_index if len(np.unique(city_index)) > 1 else np.arange(len(city_index)) % _TURNS


def solve_ridge(
    told: Float[np.ndarray, "V R E"], wanted: Float[np.ndarray, "R X"], weights: Float[np.ndarray, " R"], penalty: float
) -> Float[np.ndarray, "E1 X"]:
    """Weighted ridge regression with a free intercept; every variant of a prompt points at the same thing.

    Args:
      told: scaled prompts.
      wanted: what each region's prompts should tell.
      weights: of the regions.
      penalty: on the mean square, so that it means the same for any number of regions.

    Returns:
      Slopes, and the intercept as the last row.
    """
    return _solve(*_moments(told, wanted, weights), penalty)


def apply_ridge(solution: Float[np.ndarray, "E1 X"], told: Float[np.ndarray, "R E"]) -> Float[np.ndarray, "R X"]:
    """What a solution of `solve_ridge` tells from scaled prompts."""
    return told @ solution[:-1] + solution[-1]


def choose_penalty(
    told: Float[np.ndarray, "V R E"],
    wanted: Float[np.ndarray, "R X"],
    city_index: Int[np.ndarray, " R"],
    penalties: Sequence[float] = PENALTIES,
) -> float:
    """The penalty with the lowest squared error on cities left out in turn, seen through their first variant.

    Args:
      told: scaled prompts.
      wanted: what each region's prompts should tell.
      city_index: the city of every region; of an only city, regions are left out in five turns.
      penalties: to choose from.

    Returns:
      One of them.
    """
    weights, fold = city_weights(city_index), left_out_in_turn(city_index)
    errors = dict.fromkeys(penalties, 0.0)
    for left_out in np.unique(fold):
        rows = fold != left_out
        if not rows.any():
            continue
        moments = _moments(told[:, rows], wanted[rows], weights[rows])
        for penalty in penalties:
            made = apply_ridge(_solve(*moments, penalty), told[0, ~rows])
            error = np.square(made - wanted[~rows]).sum(axis=1)
            errors[penalty] += float((error * weights[~rows]).sum())
    return min(errors, key=lambda penalty: errors[penalty])


def _moments(
    told: Float[np.ndarray, "V R E"], wanted: Float[np.ndarray, "R X"], weights: Float[np.ndarray, " R"]
) -> tuple[Float[np.ndarray, "E1 E1"], Float[np.ndarray, "E1 X"]]:
    """Weighted means of the products of prompts, and a last column of ones, with themselves and with what is wanted."""
    variants, regions, _ = told.shape
    features = np.concatenate([told, np.ones((variants, regions, 1))], axis=2)
    share = weights / (weights.sum() * variants)
    gram = np.einsum("vre,vrf,r->ef", features, features, share, optimize=True)
    return gram, np.einsum("vre,r->er", features, share) @ wanted


def _solve(
    gram: Float[np.ndarray, "E1 E1"], moments: Float[np.ndarray, "E1 X"], penalty: float
) -> Float[np.ndarray, "E1 X"]:
    """Everything is penalised but the intercept."""
    penalties = np.full(len(gram), penalty)
    penalties[-1] = 0.0
    return np.linalg.solve(gram + np.diag(penalties), moments)
