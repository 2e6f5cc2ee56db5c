"""In: readings and the clock. Out: the mean day of every region, and on which kinds of day it was read."""

import numpy as np
from jaxtyping import Bool, Float, Int


def daily_profile(
    readings: Float[np.ndarray, "T N"], slots: Int[np.ndarray, " T"], steps_per_day: int
) -> Float[np.ndarray, "N S"]:
    """Mean reading of every region at every step of the day; unobserved steps are interpolated around the clock.

    Args:
      readings: [T, N], NaN where missing.
      slots: [T], step of the day of every row.
      steps_per_day: S.

    Returns:
      float32 [N, S] in the units of `readings`; a region without a reading gets zeros.
    """
    observed = np.isfinite(readings)
    total = sums_by_slot(np.where(observed, readings, 0.0), slots, steps_per_day)
    return profile_of_sums(total, sums_by_slot(observed, slots, steps_per_day))


def profile_of_sums(total: Float[np.ndarray, "S N"], count: Float[np.ndarray, "S N"]) -> Float[np.ndarray, "N S"]:
    """The profile of `daily_profile`, of the sums of readings at every step of the day and of their numbers."""
    profile, seen = total / np.maximum(count, 1), count > 0
    gaps = np.flatnonzero(seen.any(axis=0) & ~seen.all(axis=0))
    if len(gaps):
        profile[:, gaps] = _around_the_clock(profile[:, gaps], seen[:, gaps])
    return profile.T.astype(np.float32)


def _around_the_clock(profile: Float[np.ndarray, "S X"], seen: Bool[np.ndarray, "S X"]) -> Float[np.ndarray, "S X"]:
    """The same where it was seen, and between that a straight line, from the last of a day to the first of the next."""
    steps = len(profile)
    clock, laps = np.arange(steps)[:, None], np.concatenate([seen, seen])
    place = np.arange(2 * steps)[:, None]
    before = np.maximum.accumulate(np.where(laps, place, -1), axis=0)[steps:] - steps
    after = np.minimum.accumulate(np.where(laps, place, 2 * steps)[::-1], axis=0)[::-1][:steps]
    share = (clock - before) / np.maximum(after - before, 1)
    left, right = (np.take_along_axis(profile, at % steps, axis=0) for at in (before, after))
    return left + share * (right - left)


def sums_by_slot(values: np.ndarray, slots: Int[np.ndarray, " T"], steps_per_day: int) -> Float[np.ndarray, "S N"]:
    """Sums of rows by their step of the day."""
    sums = np.zeros((steps_per_day, values.shape[1]))
    if len(slots):
        order = np.argsort(slots, kind="stable")
        present, first = np.unique(slots[order], return_index=True)
        sums[present] = np.add.reduceat(values[order], first, axis=0, dtype=np.float64)
    return sums


def weekend_share(readings: Float[np.ndarray, "T N"], weekend: Float[np.ndarray, " T"]) -> Float[np.ndarray, " N"]:
    """The share of every region's readings that fell on a weekend.

    Args:
      readings: [T, N], NaN where missing: a closed Sunday counts for nothing.
      weekend: [T], 1 on a weekend, 0 on a weekday, 0.5 where the calendar is unknown.

    Returns:
      [N]; a region without a reading takes the share of its city's readings, 0.5 where there is none.
    """
    observed = np.isfinite(readings)
    own, total = observed.sum(axis=0), observed.sum()
    city = (weekend @ observed).sum() / total if total else 0.5
    return np.where(own > 0, (weekend @ observed) / np.maximum(own, 1), city)
