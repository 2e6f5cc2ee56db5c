"""In: rows of numbers. Out: distances between them, directions in which they differ most, some of them, few sizes."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int


def evenly(count: int, most: int) -> Int[np.ndarray, " X"]:
    """Places of at most so many of a number of things, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))


def padded_size(count: int, least: int = 16) -> int:
    """The next of few sizes, at most a quarter larger from four times the least: like numbers share a program."""
    step = max(least, 2 ** max(0, count.bit_length() - 3))
    return -(-count // step) * step


def squared_distances(
    one: Float[jax.Array | np.ndarray, "Q X"], other: Float[jax.Array | np.ndarray, "R X"]
) -> Float[jax.Array | np.ndarray, "Q R"]:
    """Squared Euclidean distances by one matrix product, in NumPy or JAX; for near rows exact to rounding only."""
    return (one * one).sum(axis=1)[:, None] + (other * other).sum(axis=1)[None, :] - 2.0 * (one @ other.T)


class PrincipalAxes(NamedTuple):
    """The leading principal axes of weighted rows."""

    centre: Float[np.ndarray, " X"]
    axes: Float[np.ndarray, "A X"]  # of length 1, the leading one first; 0 where the rows have fewer
    shares: Float[np.ndarray, " A"]  # of the variance

    def project(self, rows: Float[np.ndarray, "Q X"]) -> Float[np.ndarray, "Q A"]:
        """Coordinates of rows along the axes."""
        return (rows - self.centre) @ self.axes.T


def principal_axes(
    rows: Float[np.ndarray, "R X"], weights: Float[np.ndarray, " R"] | None = None, count: int = 2
) -> PrincipalAxes:
    """Principal component analysis by singular value decomposition.

    Args:
      rows: one per observation.
      weights: of the rows; None for equal ones.
      count: A, how many axes.

    Returns:
      The axes; the largest entry of each is positive, or a picture could flip between machines.
    """
    share = np.full(len(rows), 1 / max(len(rows), 1)) if weights is None else weights / weights.sum()
    centre = share @ rows.astype(np.float64)
    _, singular, axes = np.linalg.svd(np.sqrt(share)[:, None] * (rows - centre), full_matrices=False)
    axes = np.concatenate([axes, np.zeros((count, rows.shape[1]))])[:count]
    axes = axes * np.where(axes[np.arange(count), np.abs(axes).argmax(axis=1)] < 0, -1.0, 1.0)[:, None]
    power = np.append(np.square(singular), np.zeros(count))
    return PrincipalAxes(centre, axes, power[:count] / max(float(power.sum()), 1e-12))
