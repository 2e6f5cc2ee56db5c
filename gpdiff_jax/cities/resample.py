"""In: cities at their own intervals and with their own channels.
Out: the same cities at a common, longer interval, and with one channel each.
"""

import dataclasses
import re
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from gpdiff_jax.cities.city import AVERAGED, City, check_city, check_interval
from gpdiff_jax.errors import InputError


class PartialBins(NamedTuple):
    """How many bins of a resampled city were observed in part."""

    missing: int  # observed for less than half, hence missing
    completed: int  # observed for half or more; counts are scaled to the full bin
    total: int  # bins with any reading

    def words(self, interval_minutes: int, kind: str) -> str | None:
        """The same for people to read, of a city of a kind; None where every bin was observed whole or not at all."""
        if not (self.missing or self.completed):
            return None
        scaled = "" if kind in AVERAGED else ", their counts scaled to the full bin"
        return (
            f"of {self.total} readings of {interval_minutes} minutes, {self.missing} were observed for less than half "
            f"and are missing, {self.completed} for less than all{scaled}"
        )


def resample(city: City, interval_minutes: int, *, keep_silent: bool = False) -> City:
    """Bring a city to a longer interval: sums of counts, means of others, over the observed readings of a bin.

    Bins lie on the local clock, so the steps before the first whole bin and after the last one are dropped; a series
    of unknown start is binned from its first step. A bin that was observed for less than half is missing. Of one that
    was observed for half or more, a count is scaled to the full bin: a sum of three quarters of an hour, divided by
    three quarters. `partial_bins` says how many there are.

    Args:
      city: the city.
      interval_minutes: the new interval, a multiple of the city's own that divides a day.
      keep_silent: keep a region that is left without a reading, as of a city that is to be forecast.

    Returns:
      The city at the new interval; the same object if that is its own. Channels keep their names.

    Raises:
      InputError: the interval does not divide a day, is no multiple of the city's, no whole bin is left, or a
          region is left without a reading and is not to be kept.

    Example:
      >>> import gpdiff_jax as gpd
      >>> city = gpd.simulate_cities(gpd.SimulationConfig(cities=1, regions=6, days=3, interval_minutes=30), seed=0)[0]
      >>> city.num_steps, gpd.resample(city, 60).num_steps
      (144, 72)
    """
    grouped, start = _grouped(city, interval_minutes)
    if grouped.shape[1] == 1:
        return city
    values = combine_bins(grouped, average=city.kind in AVERAGED)
    never = np.isnan(values).all(axis=0) & ~np.isnan(grouped).all(axis=(0, 1))
    if never.any() and not keep_silent:
        node, channel = (int(index) for index in np.argwhere(never)[0])
        most = int((~np.isnan(grouped[:, :, node, channel])).sum(axis=1).max())
        raise InputError(
            f"city {city.name!r}: region {city.node_ids[node]!r} is never observed for half of {interval_minutes} "
            f"minutes (at most {most} of {grouped.shape[1]} readings of {city.feature_names[channel]!r}); choose a "
            "shorter `interval_minutes`, or drop the region from the city"
        )
    made = dataclasses.replace(city, values=values, interval_minutes=interval_minutes, start=start)
    return made if keep_silent else check_city(made, judge_extremes=False)


def partial_bins(city: City, interval_minutes: int) -> PartialBins:
    """Count the bins that were observed in part when a city is resampled.

    Args:
      city: the city, at its own interval.
      interval_minutes: the new interval.

    Returns:
      The numbers, over all regions and channels.

    Raises:
      InputError: see `resample`.
    """
    grouped, _ = _grouped(city, interval_minutes)
    count = (~np.isnan(grouped)).sum(axis=1)
    whole = grouped.shape[1]
    few, most = (count > 0) & (2 * count < whole), (2 * count >= whole) & (count < whole)
    return PartialBins(*(int(np.count_nonzero(some)) for some in (few, most, count > 0)))


def first_whole_bin(city: City, interval_minutes: int) -> int:
    """The step of a city at which its first whole bin begins on the local clock.

    Raises:
      InputError: the interval does not divide a day or is no multiple of the city's.
    """
    check_interval(interval_minutes)
    own = city.interval_minutes
    if interval_minutes % own:
        raise InputError(
            f"`interval_minutes` (={interval_minutes}) must be a multiple of the {own} minutes of city {city.name!r};"
            f" choose e.g. {_multiple_near(own, interval_minutes)}"
        )
    factor = interval_minutes // own
    if city.start is None or factor == 1:
        return 0
    minutes_since_bin = int(city.start.astype(np.int64)) % interval_minutes
    return -minutes_since_bin // own % factor


def _grouped(city: City, interval_minutes: int) -> tuple[Float[np.ndarray, "T F N C"], np.datetime64 | None]:
    """The readings of every whole bin, and the time of the first."""
    skipped, own = first_whole_bin(city, interval_minutes), city.interval_minutes
    factor = interval_minutes // own
    start = None if city.start is None else city.start + np.timedelta64(skipped * own, "m")
    bins = (city.num_steps - skipped) // factor
    if bins < 1:
        raise InputError(
            f"city {city.name!r} ({city.num_steps} steps of {own} minutes) holds no whole bin of"
            f" {interval_minutes} minutes; choose a shorter `interval_minutes`"
        )
    steps = city.values[skipped : skipped + bins * factor]
    return steps.reshape(bins, factor, city.num_nodes, city.num_channels), start


def select_channels(city: City, channels: str) -> list[City]:
    """Reduce a city to cities of one channel each, over the same graph.

    Args:
      city: the city.
      channels: "first" for the first channel, "each" for every channel as a city of its own, or a channel's name.

    Returns:
      One city that keeps its name, or for "each" one city per channel, named "city:channel".

    Raises:
      InputError: the city has no channel of that name.

    Example:
      >>> import gpdiff_jax as gpd
      >>> city = gpd.simulate_cities(gpd.SimulationConfig(cities=1, regions=6, days=3), seed=0)[0]
      >>> [one.feature_names for one in gpd.select_channels(city, "first")]
      [('visitors',)]
    """
    if channels == "first":
        return [_only_channel(city, 0, city.name)]
    if channels == "each":
        labels = [re.sub(r"[^A-Za-z0-9_.-]", "_", name) for name in city.feature_names]
        if len(set(labels)) < len(labels):  # e.g. names in another script
            labels = [f"{label}.{channel}" for channel, label in enumerate(labels)]
        return [_only_channel(city, channel, f"{city.name}:{label}") for channel, label in enumerate(labels)]
    if channels not in city.feature_names:
        known = ", ".join(("first", "each", *city.feature_names))
        raise InputError(f"`channels` (={channels!r}) is no channel of city {city.name!r}; choose from {known}")
    return [_only_channel(city, city.feature_names.index(channels), city.name)]


def _only_channel(city: City, channel: int, name: str) -> City:
    values = np.ascontiguousarray(city.values[:, :, channel : channel + 1])
    return dataclasses.replace(city, name=name, values=values, feature_names=(city.feature_names[channel],))


def combine_bins(grouped: Float[np.ndarray, "T F N C"], *, average: bool) -> Float[np.ndarray, "T N C"]:
    """Sums of counts or means of speeds over the F steps of every bin; NaN where fewer than half were read."""
    observed = ~np.isnan(grouped)
    count: Int[np.ndarray, "T N C"] = observed.sum(axis=1)
    whole = grouped.shape[1]
    # float64 keeps sums of counts exact; a sum beyond float32 becomes infinite and is refused by `check_city`.
    total = np.where(observed, grouped, 0.0).sum(axis=1, dtype=np.float64)
    with np.errstate(over="ignore"):
        mean = total / np.maximum(count, 1)
        # A bin that was observed throughout keeps its exact sum.
        combined = (mean if average else np.where(count == whole, total, mean * whole)).astype(np.float32)
    return np.where(2 * count >= whole, combined, np.float32(np.nan))


def _multiple_near(own: int, wanted: int) -> int:
    # The smallest bin of whole steps that is not shorter than asked for and still divides a day.
    days = [minutes for minutes in range(own, 1441, own) if 1440 % minutes == 0]
    return next((minutes for minutes in days if minutes >= wanted), days[-1])
