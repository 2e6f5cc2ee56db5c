"""In: mean days of regions. Out: centroids of activity classes, shared by all cities, and the classes of a region."""

import numpy as np
from jaxtyping import Float, Int

from gpdiff_jax.cities.city import City
from gpdiff_jax.cities.splits import Span
from gpdiff_jax.prompts.statistics import temporal_statistics

_ITERATIONS = 100


def mean_days(city: City, visible: Span) -> Float[np.ndarray, "N 24"]:
    """The mean day of every region in 24 bins, in standard deviations of the span (see `temporal_statistics`)."""
    table, names = temporal_statistics(city, visible)
    return table[:, [k for k, name in enumerate(names) if name.startswith("profile_")]]


def fit_centroids(
    days: Float[np.ndarray, "X 24"], weights: Float[np.ndarray, " X"], classes: int
) -> Float[np.ndarray, "K 24"]:
    """Centroids of mean days by weighted k-means (Lloyd, IEEE T-IT 28, 1982), started from days far apart.

    Args:
      days: [X, 24].
      weights: [X], how much each counts, so that a city of many regions does not take all classes.
      classes: most centroids; fewer where there are fewer different days.

    Returns:
      float32 [K, 24], in an order that depends on the days alone.
    """
    points = days.astype(np.float64)
    chosen = [int(np.argmin(np.square(points - np.average(points, axis=0, weights=weights)).sum(axis=1)))]
    while len(chosen) < classes:
        gap = _squared(points, points[chosen]).min(axis=1)
        if gap.max() <= 1e-9:
            break
        # A day that is both far and common: the greedy form of k-means++ (Arthur and Vassilvitskii, 2007).
        chosen.append(int(np.argmax(gap * weights)))
    centroids = points[chosen]
    label = np.full(len(points), -1)
    for _ in range(_ITERATIONS):
        nearest = _squared(points, centroids).argmin(axis=1)
        if (nearest == label).all():
            break
        label = nearest
        share = (label[:, None] == np.arange(len(centroids))) * weights[:, None]
        mass = share.sum(axis=0)[:, None]
        centroids = np.where(mass > 0, share.T @ points / np.maximum(mass, 1e-30), centroids)
    return centroids.astype(np.float32)


def nearest_classes(
    days: Float[np.ndarray, "N 24"], centroids: Float[np.ndarray, "K 24"], most: int
) -> Int[np.ndarray, "N M"]:
    """The `most` nearest centroids of every day, the nearest first."""
    return np.argsort(_squared(days, centroids), axis=1, kind="stable")[:, :most].astype(np.int32)


def _squared(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    # Row by row of differences: the expanded square would cancel for equal days.
    return np.stack([np.square(points - centroid).sum(axis=1) for centroid in centroids], axis=1)
