"""In: a city and the span of it that may be seen. Out: a mean and a standard deviation per region, in data units.

A region without one visible reading takes the average of its neighbours, hop by hop, so that it can be forecast; one
with a few takes their day, and of its own readings its level.
"""

import numpy as np
from jaxtyping import Bool, Float

from gpdiff_jax.cities.city import City
from gpdiff_jax.cities.splits import Span
from gpdiff_jax.errors import InputError

_SMALLEST_SHARE = 0.05
_FEW_DAYS = 0.25  # with readings of less than so many days in all, neither level nor day of a region are known
_PRIOR_STEPS = 0.25  # steps of usual readings that the level of its neighbours weighs as much as, then


Visible = Span | Bool[np.ndarray, " T"]
"""What may be seen of a city: a span of its steps, or True for each step that may be seen."""


def visible_readings(city: City, visible: Visible) -> Float[np.ndarray, "S N"]:
    """The readings of a one-channel city that may be seen, NaN where missing."""
    if isinstance(visible, Span):
        return city.values[visible.start : visible.stop, :, 0]
    return city.values[visible, :, 0]


def silent_regions(city: City, visible: Visible) -> Bool[np.ndarray, " N"]:
    """True for every region of a one-channel city without a single reading that may be seen."""
    return np.asarray(~np.isfinite(visible_readings(city, visible)).any(axis=0))


def hardly_read(city: City, visible: Visible) -> Bool[np.ndarray, " N"]:
    """True for every region without readings of a quarter of a day in all that may be seen; where all are so, of any.

    Of such a region, neither what is usual at an hour nor how far it moves can be seen from its own readings.
    """
    count = np.isfinite(visible_readings(city, visible)).sum(axis=0)
    few = count < _FEW_DAYS * city.steps_per_day
    return np.asarray(count == 0 if few.all() else few)


def fill_from_neighbours(
    rows: Float[np.ndarray, "N X"], silent: Bool[np.ndarray, " N"], city: City
) -> Float[np.ndarray, "N X"]:
    """Replaces the rows of silent regions by the mean of their graph neighbours, hop by hop.

    Args:
      rows: [N, X], any per-region quantities; those of silent regions are ignored.
      silent: [N], the rows to replace.
      city: gives the graph; both edge directions count.

    Returns:
      [N, X] without a silent row. A region that no path joins to a known one takes the mean of the city.
    """
    filled, known = np.where(silent[:, None], 0.0, rows), ~silent
    # Every silent region with each of its neighbours, once.
    edges = np.stack([city.senders, city.receivers], axis=1)
    to, neighbour = np.unique(np.concatenate([edges, edges[:, ::-1]]), axis=0).T
    to, neighbour = to[silent[to]], neighbour[silent[to]]
    while not known.all():
        use = known[neighbour] & ~known[to]
        if not use.any():
            return np.where(known[:, None], filled, filled[known].mean(axis=0)).astype(rows.dtype)
        reached, place, count = np.unique(to[use], return_inverse=True, return_counts=True)
        sums = np.zeros((len(reached), filled.shape[1]))
        np.add.at(sums, place, filled[neighbour[use]])
        filled[reached] = sums / count[:, None]
        known[reached] = True
    return filled.astype(rows.dtype)


def region_scales(city: City, visible: Visible) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """Mean and standard deviation of every region over the visible readings.

    Args:
      city: a one-channel city.
      visible: what may be seen: the training span of a source, the support days of a target.

    Returns:
      Two float32 arrays [N] in the data's units. A standard deviation is at least 5 % of the city's median one, so
      that a region that hardly moves does not blow up. A region that was `hardly_read` takes both of its neighbours,
      multiplied by what its readings are beside those of the city at the same time.

    Raises:
      InputError: no region has a reading in the visible span.
    """
    readings = visible_readings(city, visible).astype(np.float64)
    silent = silent_regions(city, visible)
    if silent.all():
        where = f" (steps {visible.start} to {visible.stop})" if isinstance(visible, Span) else ""
        raise InputError(
            f"city {city.name!r} has no reading in its visible span{where}; "
            "give it more support days, or a series that is observed there"
        )
    observed = np.isfinite(readings)
    count = np.maximum(observed.sum(axis=0), 1)
    mean = np.where(observed, readings, 0.0).sum(axis=0) / count
    variance = np.where(observed, np.square(readings - mean), 0.0).sum(axis=0) / count
    few = hardly_read(city, visible)
    moments = fill_from_neighbours(np.stack([mean, np.sqrt(variance)], axis=1), few, city)
    moments[few] *= _levels(readings, mean, few, moments[:, 0])[few, None]
    floor = max(_SMALLEST_SHARE * float(np.median(moments[:, 1])), 1e-3)
    return moments[:, 0].astype(np.float32), np.maximum(moments[:, 1], floor).astype(np.float32)


def _levels(
    readings: Float[np.ndarray, "S N"],
    mean: Float[np.ndarray, " N"],
    few: Bool[np.ndarray, " N"],
    around: Float[np.ndarray, " N"],
) -> Float[np.ndarray, " N"]:
    """How much regions with few readings read beside what their neighbours' mean and the city's day lead one to expect.

    The expected readings at a step are the neighbours' mean times the mean over the other regions of what they read
    then, each divided by its own mean; `_PRIOR_STEPS` more are taken to be as expected.
    """
    known = ~few & (mean > 0)
    relative = np.where(np.isfinite(readings), readings, 0.0)[:, known] / mean[known]
    count = np.isfinite(readings)[:, known].sum(axis=1)
    usual = np.where(count > 0, relative.sum(axis=1) / np.maximum(count, 1), 1.0)
    observed = np.isfinite(readings)
    read, expected = np.where(observed, readings, 0.0).sum(axis=0), around * (usual @ observed)
    prior = _PRIOR_STEPS * around
    return np.where(expected + prior > 0, (read + prior) / np.where(expected + prior > 0, expected + prior, 1.0), 1.0)
