"""In: the visible days of a city's regions. Out: what they lead one to expect of another day, and how far to trust it.

For every kind of day (weekday, weekend) and step of the day: the expected reading, the deviation from it that is to be
expected, and how much of the expectation was seen on days of that kind.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from gpdiff_jax.cities.city import City
from gpdiff_jax.cities.profile import profile_of_sums, sums_by_slot
from gpdiff_jax.cities.scaling import fill_from_neighbours

# In standard deviations of a region; taken as a first study of real cities had them, not chosen anew.
ALONE = 0.4  # deviation to be expected where no two visible days of one kind can be compared
UNLIKE = 0.5  # what a kind of day that was not seen adds to it, as a root mean square
SMALLEST = 0.03
LEVEL = 1.0  # what a level adds that is known of neighbours or of a few readings alone (docs/experiments.md, 32)
PRIOR = 2.0  # degrees of freedom with which the region's own deviation holds that of a step


class Expectation(NamedTuple):
    """What the visible days say of every region, by kind of day (0 weekday, 1 weekend) and step of the day."""

    profile: Float[np.ndarray, "2 N S"]  # expected reading, in the unit of the readings
    deviation: Float[np.ndarray, "2 N S"]  # expected deviation from it, root mean square, in that unit
    same_kind: Float[np.ndarray, "2 N S"]  # 1 where `profile` is of such days alone, 0 where none was read; or between

    def filled(self, few: Bool[np.ndarray, " N"], city: City) -> "Expectation":
        """The same, where regions with few readings or none take what their graph neighbours lead one to expect.

        How far off their level may be is added to their deviations (`LEVEL`).
        """
        if few.all() or not few.any():
            return self
        rows = np.moveaxis(np.stack(self), 2, 0).reshape(len(few), -1)
        filled = fill_from_neighbours(rows, few, city).reshape(len(few), 3, 2, -1)
        profile, deviation, same_kind = np.moveaxis(filled, 0, 2)
        wider = np.where(few[:, None], np.hypot(deviation, np.float32(LEVEL)), deviation)
        return Expectation(profile, wider, same_kind)


def expectation(
    readings: Float[np.ndarray, "T N"],
    slots: Int[np.ndarray, " T"],
    weekend: Bool[np.ndarray, " T"] | None,
    steps_per_day: int,
) -> Expectation:
    """What a few days of readings lead one to expect of another day.

    The expected reading of a kind of day is the mean at that step over the days of the kind (`daily_profile`), where
    one was read in the hour around the step, and the mean over all days elsewhere. The expected deviation is estimated
    as in an analysis of variance with days as repetitions: squares of the deviations of days from the mean of their
    kind, summed over the hour before and after the step and divided by their degrees of freedom (days less one, per
    kind and step), shrunk towards the same over the whole day by a scaled inverse chi-squared prior (Gelman et al.,
    "Bayesian Data Analysis", 3rd ed., 2.6) of `PRIOR` degrees of freedom. A kind of day that was not seen adds
    `UNLIKE` squared.

    Args:
      readings: [T, N], NaN where missing, each region in units of its own standard deviation; rows are steps in any
        order, of whole or broken days.
      slots: [T], step of the day of every row.
      weekend: [T], whether a row falls on a weekend; None where the calendar is unknown, and every day of one kind.
      steps_per_day: S.

    Returns:
      float32 arrays. A region without a reading is expected at 0, as on a kind of day that was not seen. Where no
      region has two days of a kind to compare, deviations are `ALONE`; where some have, the others take the root mean
      square of theirs.
    """
    kinds = [np.ones(len(slots), bool)] if weekend is None else [~weekend, weekend]
    reach = max(1, round(steps_per_day / 24))
    profiles, seen = [], []
    totals, counts = np.zeros((2, steps_per_day, readings.shape[1]))
    squares = np.zeros((steps_per_day, readings.shape[1]))
    freedom = np.zeros_like(squares)
    for rows in kinds:
        own, own_slots = readings[rows].astype(np.float64), slots[rows]
        observed = np.isfinite(own)
        count, total = (
            sums_by_slot(values, own_slots, steps_per_day) for values in (observed, np.where(observed, own, 0))
        )
        apart = np.where(observed, own - (total / np.maximum(count, 1))[own_slots], 0.0)
        squares += sums_by_slot(np.square(apart), own_slots, steps_per_day)
        freedom += np.maximum(count - 1, 0)
        totals, counts = totals + total, counts + count
        profiles.append(profile_of_sums(total, count))
        seen.append(_around(count, reach).T > 0)
    everyday = profile_of_sums(totals, counts)
    deviation = _deviations(squares, freedom, reach)
    if weekend is None:
        # The days ahead may be of the kind that was seen, or not.
        half = np.full((2, *everyday.shape), 0.5)
        return _expectation(np.stack([everyday, everyday]), deviation, half)
    known = np.stack(seen)
    return _expectation(np.where(known, np.stack(profiles), everyday), deviation, known.astype(np.float64))


def _expectation(
    profile: Float[np.ndarray, "2 N S"], deviation: Float[np.ndarray, "N S"], same_kind: Float[np.ndarray, "2 N S"]
) -> Expectation:
    wide = np.sqrt(np.square(deviation) + UNLIKE**2 * (1.0 - same_kind))
    return Expectation(*(values.astype(np.float32) for values in (profile, np.maximum(wide, SMALLEST), same_kind)))


def _deviations(
    squares: Float[np.ndarray, "S N"], freedom: Float[np.ndarray, "S N"], reach: int
) -> Float[np.ndarray, "N S"]:
    """Root mean squares around every step of the day, shrunk towards that of the region."""
    total, of_region = freedom.sum(axis=0), squares.sum(axis=0)
    city = of_region.sum() / total.sum() if total.any() else ALONE**2
    own = np.where(total > 0, of_region / np.maximum(total, 1), city)
    return np.sqrt((_around(squares, reach) + PRIOR * own) / (_around(freedom, reach) + PRIOR)).T


def _around(rows: Float[np.ndarray, "S N"], reach: int) -> Float[np.ndarray, "S N"]:
    """Sums over the steps within reach on either side, around the clock, each step once."""
    steps = len(rows)
    before, after = (reach, reach) if 2 * reach < steps else (0, steps - 1)
    return np.stack([np.roll(rows, k, axis=0) for k in range(-after, before + 1)]).sum(axis=0)
