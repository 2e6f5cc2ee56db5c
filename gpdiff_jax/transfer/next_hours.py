"""In: parameters of a city's regions, and its readings up to now. Out: its windows ahead, and forecasts of them."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from gpdiff_jax.cities.city import City
from gpdiff_jax.cities.recent import nearly_whole_days
from gpdiff_jax.cities.resample import resample
from gpdiff_jax.cities.splits import Span, TargetSplit, split_before
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.data.target import Target
from gpdiff_jax.errors import InputError
from gpdiff_jax.region_parameters import RegionParameters, model_of
from gpdiff_jax.transfer.adapt_config import AdaptConfig
from gpdiff_jax.transfer.evaluate import MethodForecast, few_shot, zero_shot
from gpdiff_jax.transfer.quantiles import forecast_quantiles
from gpdiff_jax.typing import Key


class NextHours(NamedTuple):
    """What comes after the last reading of a city."""

    forecast: Float[np.ndarray, "R P"]  # data units, mean over the samples
    spread: Float[np.ndarray, "R P"] | None  # standard deviation over the samples; None with a single one
    quantiles: Float[np.ndarray, "R P Q"] | None  # at `quantiles.LEVELS`; None where nothing says how far it may be off
    times: np.ndarray | None  # datetime64[m] [P], local begin of every step; None where the calendar is unknown
    node_ids: tuple[str, ...]  # R

    def as_window(self) -> MethodForecast:
        """The same as the forecasts of a single window."""
        spread, quantiles = (None if part is None else part[None] for part in (self.spread, self.quantiles))
        return MethodForecast(self.forecast[None], spread, 0.0, quantiles=quantiles)


def at_interval(city: City, minutes: int) -> City:
    """A city at the interval that its forecaster was made for, its silent regions too.

    Raises:
      InputError: its readings are further apart.
    """
    if minutes % city.interval_minutes:
        raise InputError(
            f"city {city.name!r} has a reading every {city.interval_minutes} minutes, and the generator forecasts "
            f"every {minutes}; give it readings every {minutes} minutes, or of an interval that divides these"
        )
    return resample(city, minutes, keep_silent=True)


def days_of(read: City, data: DataConfig, rolling_days: int = 0) -> int:
    """As many support days as a generator is used to, or as the city has before what is forecast; at least one."""
    return max(1, min(most_days(data), read.num_steps // read.steps_per_day - rolling_days))


def most_days(data: DataConfig) -> int:
    """The most support days that parameters know what to do with."""
    return data.support_days if data.window_days is None else data.window_days[1]


def with_whole_days(read: City, data: DataConfig) -> City:
    """A city of few days whose first, if more than half of it lies in the series, is whole: its beginning is missing.

    A series that begins with the first train, or some minutes too late, has one more day than it has times 24 hours.

    Args:
      read: what was read of a city.
      data: of which the most support days count.

    Returns:
      The city; of less than a day, or of more than may be seen, as it was.
    """
    days = nearly_whole_days(read.num_steps, read.steps_per_day)
    short = days * read.steps_per_day - read.num_steps
    if short <= 0 or days > most_days(data):
        return read
    values = np.concatenate([np.full((short, *read.values.shape[1:]), np.nan, np.float32), read.values])
    start = None if read.start is None else read.start - short * np.timedelta64(read.interval_minutes, "m")
    return dataclasses.replace(read, values=values, start=start)


class WindowsAhead(NamedTuple):
    """What is forecast of a city."""

    city: City  # P steps longer than what was read where the future is forecast
    split: TargetSplit
    starts: Int[np.ndarray, " S"]  # first step of every window's history


def windows_ahead(read: City, data: DataConfig, rolling_days: int = 0) -> WindowsAhead:
    """Chooses which windows of a city are forecast, and its support days, which lie right before them.

    Args:
      read: at the interval that is forecast.
      data: of which the number of support days, history and horizon count.
      rolling_days: 0 for the P steps after the last reading; else all windows of the last so many days.

    Returns:
      The windows.

    Raises:
      InputError: the city is too short for them.
    """
    if rolling_days:
        city, ahead = read, Span(read.num_steps - rolling_days * read.steps_per_day, read.num_steps)
        before = f"its last {rolling_days} days, which `rolling_days` forecasts"
        if ahead.start < 0:
            raise InputError(
                f"`rolling_days` (={rolling_days}) is longer than the {read.num_steps / read.steps_per_day:.1f} days "
                f"of city {read.name!r}; use fewer, with support days before them"
            )
        if len(ahead) < data.horizon:
            raise InputError(
                f"`rolling_days` (={rolling_days}) hold {len(ahead)} steps of city {read.name!r}, fewer than horizon "
                f"(={data.horizon}); use more days"
            )
    else:
        unread = np.full((data.horizon, *read.values.shape[1:]), np.nan, np.float32)
        city = dataclasses.replace(read, values=np.concatenate([read.values, unread]))
        ahead, before = Span(read.num_steps, city.num_steps), "what is forecast"
    days, per_day = data.support_days, read.steps_per_day
    split = split_before(ahead, per_day, days, history=data.history, before=before, name=read.name)
    last = ahead.stop - data.history - data.horizon
    return WindowsAhead(city, split, np.arange(ahead.start - data.history, last + 1, dtype=np.int32))


def until(city: City, at: np.datetime64) -> City:
    """A city as it was known at a moment: the steps that were over by then.

    Args:
      city: of known start.
      at: local time.

    Returns:
      The city. Up to a day after its last reading, what was not read by then is missing.

    Raises:
      InputError: the start of the city is unknown, or `at` lies before the end of its first step, or more than a day
        after its last.
    """
    if city.start is None:
        raise InputError(f"city {city.name!r} has no start, so `at` (={at}) says nothing; give the city its start")
    step = np.timedelta64(city.interval_minutes, "m")
    over = int((at.astype("datetime64[m]") - city.start) // step)
    first, last = city.start + step, city.start + city.num_steps * step
    if over < 1 or over > city.num_steps + city.steps_per_day:
        raise InputError(
            f"`at` (={at}) must lie between {first}, when the first reading of city {city.name!r} was over, and a day "
            f"after {last}, when its last was; choose a moment there, or bring the readings up to date"
        )
    late = np.full((max(over - city.num_steps, 0), *city.values.shape[1:]), np.nan, np.float32)
    return dataclasses.replace(city, values=np.concatenate([city.values[:over], late]))


def next_hours(made: MethodForecast, city: City, steps: Int[np.ndarray, " P"]) -> NextHours:
    """The forecasts of the last window of a city, which are of some steps of it, with their times."""
    times = None if city.start is None else city.start + steps * np.timedelta64(city.interval_minutes, "m")
    spread, quantiles = (None if part is None else part[-1] for part in (made.spread, made.quantiles))
    return NextHours(made.forecast[-1], spread, quantiles, times, city.node_ids)


def forecast_target(
    parameters: RegionParameters, target: Target, adapt: AdaptConfig | None, key: Key | None
) -> MethodForecast:
    """The forecasts of a target's windows, as the parameters are or fine-tuned on its support, with quantiles."""
    model, params = model_of(parameters, target.sizes), parameters.params
    if adapt is None:
        made = zero_shot(model, target, params)
    else:
        own_key = jax.random.key(0) if key is None else key
        made = few_shot(model, target, params, adapt, key=own_key, directions=parameters.directions)
    return made._replace(quantiles=forecast_quantiles(model, target, params, made, parameters.residuals))
