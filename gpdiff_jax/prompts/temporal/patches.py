"""In: a span of a city's readings at any interval. Out: patches of a fixed length of time, on the clock.

A patch holds a fixed number of bins, so what reads patches need not know the interval.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from gpdiff_jax.cities.calendar import clock_features, minutes_of_week
from gpdiff_jax.cities.city import MINUTES_PER_DAY, City
from gpdiff_jax.cities.splits import Span
from gpdiff_jax.errors import InputError

_SMALLEST_UNIT = 1e-3  # in the data's units, for a city that does not move


class Patches(NamedTuple):
    """Q consecutive patches of K bins, of all regions of one city."""

    bins: Float[np.ndarray, "N Q bins"]  # mean of the observed readings in units of `unit`; 0 where there is none
    share: Float[np.ndarray, "N Q bins"]  # share of the bin that was observed, 0..1
    clock: Float[np.ndarray, "Q F"]  # time of day and day of week at which each patch begins
    days: Float[np.ndarray, " Q"]  # days since the first patch
    unit: float  # data units: the median over regions of their standard deviation

    @property
    def observed(self) -> np.ndarray:
        """True for every patch [N, Q] in which something was observed."""
        return self.share.sum(axis=2) > 0


def bin_weights(interval_minutes: int, patch_minutes: int, bins: int) -> Float[np.ndarray, "bins s"]:
    """The share of every bin of a patch that each of its steps covers; rows sum to 1.

    A step shorter than a bin falls into one or two of them, a longer one covers several.
    """
    steps = patch_minutes // interval_minutes
    step_begin, bin_begin = np.arange(steps) / steps, np.arange(bins)[:, None] / bins
    shared = np.minimum(step_begin + 1 / steps, bin_begin + 1 / bins) - np.maximum(step_begin, bin_begin)
    weights = np.where(shared > 1e-9, shared, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def cut_patches(city: City, span: Span, patch_minutes: int, bins: int) -> Patches:
    """Cuts the readings of a span into patches that begin on the clock.

    Args:
      city: a one-channel city.
      span: what may be seen; its first and last patch may reach beyond it, unobserved there.
      patch_minutes: length of a patch; divides a day.
      bins: K, bins per patch.

    Returns:
      The patches of all N regions.

    Raises:
      InputError: the city's interval does not divide the patch, or the span is shorter than a day or holds no reading.
    """
    interval = city.interval_minutes
    if patch_minutes % interval:
        raise InputError(
            f"the interval of city {city.name!r} (={interval} minutes) must divide the {patch_minutes} minutes of a "
            f"patch; resample the city, or choose a `patch_minutes` that is a multiple of {interval}"
        )
    if len(span) < city.steps_per_day:
        raise InputError(
            f"the span of city {city.name!r} (steps {span.start} to {span.stop}) is shorter than a day; "
            f"give at least {city.steps_per_day} steps"
        )
    readings = city.values[span.start : span.stop, :, 0].astype(np.float64)
    if not np.isfinite(readings).any():
        raise InputError(
            f"city {city.name!r} has no reading in the span to encode (steps {span.start} to {span.stop}); "
            "give it more support days, or a series that is observed there"
        )
    steps = patch_minutes // interval
    first_minute = int(minutes_of_week(city)[span.start])
    lead = first_minute % patch_minutes // interval
    count = -(-(lead + len(span)) // steps)
    grid = np.full((count * steps, city.num_nodes), np.nan)
    grid[lead : lead + len(span)] = readings
    grid = grid.reshape(count, steps, city.num_nodes)
    seen, weights = np.isfinite(grid), bin_weights(interval, patch_minutes, bins)
    share = np.einsum("ks,qsn->nqk", weights, seen.astype(np.float64))
    total = np.einsum("ks,qsn->nqk", weights, np.where(seen, grid, 0.0))
    mean = np.where(share > 0, total / np.where(share > 0, share, 1.0), 0.0)
    unit = _unit(mean, share)
    begin = first_minute - lead * interval + patch_minutes * np.arange(count, dtype=np.int64)
    return Patches(
        bins=(mean / unit).astype(np.float32),
        share=np.minimum(share, 1.0).astype(np.float32),
        clock=clock_features(begin % (7 * MINUTES_PER_DAY), week_known=city.start is not None),
        days=(np.arange(count) * patch_minutes / MINUTES_PER_DAY).astype(np.float32),
        unit=unit,
    )


def region_deviations(
    bins: Float[np.ndarray, "N Q bins"], share: Float[np.ndarray, "N Q bins"]
) -> Float[np.ndarray, " N"]:
    """Standard deviation of every region over its observed bins; 0 where nothing was observed."""
    count = np.maximum(share.sum(axis=(1, 2), dtype=np.float64), 1e-9)
    mean = (share * bins).sum(axis=(1, 2), dtype=np.float64) / count
    power = (share * np.square(bins - mean[:, None, None])).sum(axis=(1, 2), dtype=np.float64)
    return np.sqrt(power / count)


def _unit(bins: np.ndarray, share: np.ndarray) -> float:
    silent = share.sum(axis=(1, 2)) == 0
    return max(float(np.median(region_deviations(bins, share)[~silent])), _SMALLEST_UNIT)
