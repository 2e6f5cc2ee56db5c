"""In: a city's start and interval. Out: time-of-day and day-of-week features, and which steps fall on a weekend.

A city whose start is unknown is taken to begin at midnight, and has no day of week: those features are zero.
"""

import datetime

import numpy as np
from jaxtyping import Bool, Float, Int

from gpdiff_jax.cities.city import City
from gpdiff_jax.errors import InputError

HARMONICS = 8
NUM_CALENDAR = 2 * HARMONICS + 4

_MINUTES_PER_DAY = 1440
_MONDAY = np.datetime64("1970-01-05T00:00", "m")


def local_moment(text: str, name: str, remedy: str = "") -> np.datetime64:
    """Reads a moment on the clocks of a city.

    Args:
      text: ISO 8601, in whole minutes and without an offset from UTC.
      name: what it is, for the message.
      remedy: what else to do about it, for the message.

    Returns:
      datetime64[m].

    Raises:
      InputError: it is no such time.
    """
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise InputError(f"`{name}` (={text!r}) must be an ISO time, e.g. 2024-01-31T00:00{remedy}") from None
    if moment.tzinfo is not None or moment.second or moment.microsecond:
        raise InputError(
            f"`{name}` (={text!r}) must be local time in whole minutes; drop the time zone and the seconds"
        )
    return np.datetime64(moment, "m")


def minutes_of_week(city: City) -> Int[np.ndarray, " T"]:
    """Minutes since Monday midnight of every step (since midnight of step 0's day where the start is unknown)."""
    steps = np.arange(city.num_steps, dtype=np.int64) * city.interval_minutes
    if city.start is None:
        return steps
    since_monday = (city.start.astype("datetime64[m]") - _MONDAY).astype(np.int64)
    return (since_monday + steps) % (7 * _MINUTES_PER_DAY)


def slot_of_day(city: City) -> Int[np.ndarray, " T"]:
    """Index of every step within its day, 0 to steps_per_day - 1."""
    return minutes_of_week(city) % _MINUTES_PER_DAY // city.interval_minutes


def is_weekend(city: City) -> Bool[np.ndarray, " T"] | None:
    """True on Saturdays and Sundays; None where the start of the city is unknown."""
    if city.start is None:
        return None
    return minutes_of_week(city) >= 5 * _MINUTES_PER_DAY


def calendar_features(city: City) -> Float[np.ndarray, "T F"]:
    """Time of day as eight harmonics, and day of week.

    Args:
      city: any city.

    Returns:
      float32 [T, 20], see `clock_features`.
    """
    return clock_features(minutes_of_week(city), week_known=city.start is not None)


def clock_features(minutes: Int[np.ndarray, " T"], *, week_known: bool) -> Float[np.ndarray, "T F"]:
    """Time of day as eight harmonics, and day of week, of any moments.

    Args:
      minutes: since Monday midnight, or since any midnight where the week is not known.
      week_known: whether the day of the week is.

    Returns:
      float32 [T, 20]: sin and cos of the first eight harmonics of the day; then is-Saturday, is-Sunday, and sin and cos
      of the week. The last four are zero where the week is not known.
    """
    day_angle = 2 * np.pi * (minutes % _MINUTES_PER_DAY) / _MINUTES_PER_DAY
    columns = [f(k * day_angle) for k in range(1, HARMONICS + 1) for f in (np.sin, np.cos)]
    if week_known:
        day = minutes // _MINUTES_PER_DAY
        week_angle = 2 * np.pi * minutes / (7 * _MINUTES_PER_DAY)
        columns += [(day == 5) * 1.0, (day == 6) * 1.0, np.sin(week_angle), np.cos(week_angle)]
    else:
        columns += [np.zeros_like(day_angle)] * 4
    return np.stack(columns, axis=1).astype(np.float32)
