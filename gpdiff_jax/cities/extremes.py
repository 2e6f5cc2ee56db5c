"""In: the readings of a city. Out: the first one that no region ever comes near, as a fill value is (2147483647)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

# How many times a reading lies beyond what its own region and beyond what every region of its city usually reads. In 25
# published cities the most extreme is 17 times the first (a bus stop) and 2.4 times the second (a day of a concert);
# of speeds, 2.4 and 1.8 times.
_FAR_OF_COUNTS = 20.0
_FAR_OF_SPEEDS = 5.0
_FAR_FROM_CITY = 5.0
_FAR_FROM_REGIONS = 200.0  # a region that reads so many times more than any other is filled nearly throughout
_LEAST_READINGS = 100
_FEWEST_READINGS = 12  # where no region has so many, as in a city that began three days ago: most have them after a day


class Extreme(NamedTuple):
    """A reading far beyond all others."""

    step: int
    node: int
    value: float
    usual: float  # the 99th percentile of the region's readings
    others: int  # how many more there are


def find_extreme(readings: Float[np.ndarray, "T N"], *, speed: bool) -> Extreme | None:
    """The first reading that lies far beyond its region's 99th percentile and beyond the largest one of the city.

    The percentile is that of the positive readings below the first gap in them, in order of size: an outage that is
    filled with one value may be more than a hundredth of a region's readings, and most readings may be zeros. A region
    of fewer than a hundred readings, or one that is filled nearly throughout, is judged by what the others read; where
    none has a hundred, a dozen are enough.

    Args:
      readings: [T, N], NaN where missing.
      speed: whether they are speeds, which vary less than counts.

    Returns:
      The reading that comes first in time; None where there is none, or no region has a dozen readings.
    """
    usual, limit = _limits(readings, speed)
    if limit is None:
        return None
    with np.errstate(invalid="ignore"):
        wrong = readings > limit
    if not wrong.any():
        return None
    step, node = (int(index) for index in np.argwhere(wrong)[0])
    return Extreme(step, node, float(readings[step, node]), float(usual[node]), int(np.count_nonzero(wrong)) - 1)


def most_usual(readings: Float[np.ndarray, "T N"], *, speed: bool) -> Float[np.ndarray, " N"] | None:
    """The readings above which `find_extreme` finds one, by region; None where no region has a dozen readings."""
    return _limits(readings, speed)[1]


def _limits(
    readings: Float[np.ndarray, "T N"], speed: bool
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"] | None]:
    """The 99th percentile of every region as it is judged, and the most that it may read."""
    far = _FAR_OF_SPEEDS if speed else _FAR_OF_COUNTS
    ordered = np.sort(readings, axis=0)  # NaN last
    count = np.isfinite(readings).sum(axis=0)
    judged = count >= (_LEAST_READINGS if (count >= _LEAST_READINGS).any() else _FEWEST_READINGS)
    usual = np.zeros(len(count))
    if not judged.any():
        return usual, None
    usual[judged] = [_usual(ordered[: count[node], node], far) for node in np.flatnonzero(judged)]
    most = _below_gap(np.sort(usual[judged]), _FAR_FROM_REGIONS)[-1]
    usual = np.where(judged, np.minimum(usual, most), most)
    return usual, np.maximum(far * usual, _FAR_FROM_CITY * most)


def _usual(ordered: Float[np.ndarray, " X"], far: float) -> float:
    """The 99th percentile of sorted readings that are above zero and below the first gap; at least 1."""
    positive = ordered[ordered > 0]
    if not len(positive):
        return 1.0
    body = _below_gap(positive, far)
    # Of values in order no sort is needed; the lower of the two neighbours, which no fill value can pull up.
    return max(float(body[int(0.99 * (len(body) - 1))]), 1.0)


def _below_gap(ordered: Float[np.ndarray, " X"], far: float) -> Float[np.ndarray, " Y"]:
    """Sorted values below the first that is so many times the one before it, in their upper half."""
    middle = len(ordered) // 2
    upper = ordered[middle:].astype(np.float64)
    gaps = np.flatnonzero(upper[1:] > far * np.maximum(upper[:-1], 1.0))
    return ordered[: middle + 1 + gaps[0]] if len(gaps) else ordered
