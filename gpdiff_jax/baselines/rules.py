"""In: a target city and its support days. Out: forecasts of the test by the rules that every method has to beat."""

import numpy as np
from jaxtyping import Float, Int

from gpdiff_jax.cities.calendar import is_weekend, slot_of_day
from gpdiff_jax.cities.city import City
from gpdiff_jax.cities.profile import daily_profile
from gpdiff_jax.cities.scaling import fill_from_neighbours, silent_regions
from gpdiff_jax.cities.splits import Span


def historical_average(
    city: City, support: Span, starts: Int[np.ndarray, " S"], *, history: int, horizon: int
) -> Float[np.ndarray, "S R P"]:
    """Mean of the support days at the same time of day, weekdays and weekends apart where both were seen.

    Args:
      city: a one-channel city.
      support: its visible days.
      starts: [S], starts of the test windows.
      history: H.
      horizon: P.

    Returns:
      Forecasts in data units. A region without a visible reading takes its neighbours' average.
    """
    readings, slots = city.values[support.start : support.stop, :, 0], slot_of_day(city)
    weekend = is_weekend(city)
    everyday = daily_profile(readings, slots[support.start : support.stop], city.steps_per_day)
    by_kind = {True: everyday, False: everyday}
    if weekend is not None:
        seen = weekend[support.start : support.stop]
        for kind in (True, False):
            rows = seen if kind else ~seen
            # Half a day of the other kind says less about it than all days together.
            if rows.sum() >= city.steps_per_day:
                own = daily_profile(readings[rows], slots[support.start : support.stop][rows], city.steps_per_day)
                unseen = np.asarray(~np.isfinite(readings[rows]).any(axis=0))
                by_kind[kind] = np.where(unseen[:, None], everyday, own)
    silent = silent_regions(city, support)
    by_kind = {kind: fill_from_neighbours(profile, silent, city) for kind, profile in by_kind.items()}
    steps = starts[:, None] + history + np.arange(horizon)
    flags = np.zeros(steps.shape, bool) if weekend is None else weekend[steps]
    chosen = np.where(flags[None], by_kind[True][:, slots[steps]], by_kind[False][:, slots[steps]])
    return chosen.transpose(1, 0, 2).astype(np.float32)


def last_value(
    city: City, support: Span, starts: Int[np.ndarray, " S"], *, history: int, horizon: int
) -> Float[np.ndarray, "S R P"]:
    """The last observed reading of the history, at every horizon step.

    Args:
      city: a one-channel city.
      support: its visible days, whose mean serves where the whole history is missing.
      starts: [S], starts of the test windows.
      history: H.
      horizon: P.

    Returns:
      Forecasts in data units. A region without a visible reading falls back to its neighbours' mean.
    """
    readings = city.values[:, :, 0]
    visible = readings[support.start : support.stop]
    seen = np.isfinite(visible)
    mean = np.where(seen, visible, 0.0).sum(axis=0) / np.maximum(seen.sum(axis=0), 1)
    fallback = fill_from_neighbours(mean[:, None], silent_regions(city, support), city)[:, 0]
    last = np.repeat(fallback[None], len(starts), axis=0)
    for step in range(history):
        reading = readings[starts + step]
        last = np.where(np.isfinite(reading), reading, last)
    return np.repeat(last[:, :, None], horizon, axis=2).astype(np.float32)
