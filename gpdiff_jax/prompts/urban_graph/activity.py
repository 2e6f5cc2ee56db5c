"""In: what may be seen of cities. Out: centroids of activity classes, shared by all cities; the classes of a region."""

import numpy as np
from jaxtyping import Float, Int

from gpdiff_jax.cities.city import City
from gpdiff_jax.cities.splits import Span
from gpdiff_jax.prompts.statistics import temporal_statistics

_ITERATIONS = 100
_HARMONICS = 3  # of the day; finer detail of a few days is noise, and in many directions no class has a neighbour


def relative_days(city: City, visible: Span) -> Float[np.ndarray, "N 24"]:
    """How the mean day of every region differs from that of its city.

    A metro that closes at night and a street that never does have no mean day in common, but both have regions that
    wake earlier than the rest: what a region is within its city is what cities share.

    Args:
      city: a one-channel city.
      visible: the span that may be seen.

    Returns:
      float32 [N, 24]: mean days in standard deviations of the span (see `temporal_statistics`), less their mean over
      the city, smoothed to their first harmonics, and divided by their root mean square size.
    """
    table, names = temporal_statistics(city, visible)
    days = table[:, [k for k, name in enumerate(names) if name.startswith("profile_")]].astype(np.float64)
    rhythm = np.fft.rfft(days - days.mean(axis=0, keepdims=True), axis=1)
    rhythm[:, _HARMONICS + 1 :] = 0.0
    apart = np.fft.irfft(rhythm, n=days.shape[1], axis=1)
    spread = np.sqrt(np.square(apart).sum(axis=1).mean())
    return (apart / max(float(spread), 1e-6)).astype(np.float32)


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
