"""In: a few days of a city's readings, or its graph. Out: named statistics of every region, the first form of a prompt.

All but the level and the one-step lags are free of units and of the interval, so that cities can be compared.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

from gpdiff_jax.cities.calendar import is_weekend, slot_of_day
from gpdiff_jax.cities.city import City
from gpdiff_jax.cities.expectation import ALONE
from gpdiff_jax.cities.hops import hops_between
from gpdiff_jax.cities.profile import daily_profile, sums_by_slot, weekend_share
from gpdiff_jax.cities.scaling import fill_from_neighbours, hardly_read, region_scales
from gpdiff_jax.cities.splits import Span

_PROFILE_BINS = 24
_LAG_HOURS = (1, 2, 3, 6, 12, 24)


def temporal_statistics(city: City, visible: Span) -> tuple[Float[np.ndarray, "N E"], tuple[str, ...]]:
    """How every region behaves in a few days.

    Args:
      city: a one-channel city.
      visible: the span that may be seen.

    Returns:
      float32 [N, E] and E names: the mean day in 24 bins, in standard deviations of the span; autocorrelation at 1, 2,
      3, 6, 12 and 24 hours; autocorrelation of the deviation from the mean day of its kind (weekday, weekend) at one
      step and at an hour, and its size; correlation of that deviation with the neighbours' and with the city's;
      skewness; level and coefficient of variation (log); missing share; share of zeros; share of readings on a weekend;
      days of the span (log). The size of deviations is estimated without bias whatever the number of days; where no two
      days of a kind can be compared, it is that of `expectation.ALONE`, and a correlation without pairs is 0. A region
      that was hardly read takes the mean of its neighbours' statistics.
    """
    readings = city.values[visible.start : visible.stop, :, 0].astype(np.float64)
    observed = np.isfinite(readings)
    mean, std = (scale.astype(np.float64) for scale in region_scales(city, visible))
    scaled = np.where(observed, (readings - mean) / std, np.nan)
    slots = slot_of_day(city)[visible.start : visible.stop]
    day = daily_profile(scaled, slots, city.steps_per_day).astype(np.float64)
    weekend = is_weekend(city)
    kinds = None if weekend is None else weekend[visible.start : visible.stop]
    deviation = _within_kinds(scaled, slots, kinds, city.steps_per_day)
    around = _neighbour_mean(city, deviation)
    everyone = _mean_of_observed(deviation, axis=1)[:, None]
    clock = np.arange(_PROFILE_BINS) * city.steps_per_day / _PROFILE_BINS
    bins = np.stack([np.interp(clock, np.arange(city.steps_per_day), row, period=city.steps_per_day) for row in day])
    count = np.maximum(observed.sum(axis=0), 1)
    columns = {f"profile_{k:02d}h": bins[:, k] for k in range(_PROFILE_BINS)}
    for hours in _LAG_HOURS:
        columns[f"autocorrelation_{hours}h"] = _correlation(scaled, scaled, lag=_steps(city, hours))
    columns["deviation_autocorrelation_step"] = _correlation(deviation, deviation, lag=1)
    columns["deviation_autocorrelation_1h"] = _correlation(deviation, deviation, lag=_steps(city, 1))
    compared = np.isfinite(deviation).any(axis=0)
    columns["deviation_share"] = np.where(compared, np.sqrt(_mean_of_observed(np.square(deviation), axis=0)), ALONE)
    columns["deviation_with_neighbours"] = _correlation(deviation, around, lag=0)
    columns["deviation_after_neighbours"] = _correlation(deviation, around, lag=1)
    columns["deviation_with_city"] = _correlation(deviation, np.broadcast_to(everyone, deviation.shape), lag=0)
    columns["skewness"] = np.clip(_mean_of_observed(scaled**3, axis=0), -5, 5)
    columns["log_level"] = np.log1p(np.abs(mean))
    columns["log_variation"] = np.log((std + 1e-3) / (np.abs(mean) + std + 1e-3))
    columns["missing_share"] = 1.0 - observed.mean(axis=0)
    columns["zero_share"] = (readings == 0).sum(axis=0) / count
    columns["weekend_share"] = (
        np.full(city.num_nodes, 2 / 7)
        if weekend is None
        else weekend_share(readings, weekend[visible.start : visible.stop].astype(np.float64))
    )
    columns["log_days"] = np.full(city.num_nodes, np.log(len(visible) / city.steps_per_day))
    table = np.stack(list(columns.values()), axis=1)
    return fill_from_neighbours(table, hardly_read(city, visible), city).astype(np.float32), tuple(columns)


def spatial_statistics(city: City) -> tuple[Float[np.ndarray, "N E"], tuple[str, ...]]:
    """Where every region lies in its city's graph.

    Args:
      city: any city; its coordinates are used where it has them.

    Returns:
      float32 [N, E] and E names: degree and weighted degree relative to the city's mean, share of the neighbours that
      are linked among themselves, mean hops to all regions relative to the city's mean (closeness), regions within two
      hops, and distance to the fifth nearest region relative to the city's median (0 without coordinates).
    """
    weights = np.maximum(city.adjacency(), city.adjacency().T)
    linked = weights > 0
    degree = linked.sum(axis=1)
    triangles = ((linked @ linked.astype(np.float64)) * linked).sum(axis=1)
    hops = hops_between(linked, apart=float(city.num_nodes))
    distance = np.log(np.maximum(hops.mean(axis=1), 1e-9))  # a city of one region has no distance
    within_two = (hops <= 2).sum(axis=1) - 1
    columns = {
        "log_degree": np.log1p(degree) - np.log1p(degree).mean(),
        "log_strength": np.log1p(weights.sum(axis=1)) - np.log1p(weights.sum(axis=1)).mean(),
        "clustering": triangles / np.maximum(degree * (degree - 1), 1),
        "log_mean_hops": distance - distance.mean(),
        "share_within_two_hops": within_two / max(city.num_nodes - 1, 1),
        "log_spacing": _spacing(city),
    }
    return np.stack(list(columns.values()), axis=1).astype(np.float32), tuple(columns)


def _within_kinds(
    scaled: Float[np.ndarray, "T N"],
    slots: Int[np.ndarray, " T"],
    weekend: Bool[np.ndarray, " T"] | None,
    steps_per_day: int,
) -> Float[np.ndarray, "T N"]:
    """Deviations of readings from the mean at that step over the days of their kind.

    A mean of n days takes a part of every deviation with it; they are made larger by sqrt(n / (n - 1)), which makes
    the expectation of their square the variance whatever n is. NaN where a single day was read.
    """
    kinds = [np.ones(len(slots), bool)] if weekend is None else [~weekend, weekend]
    deviation = np.full(scaled.shape, np.nan)
    for rows in kinds:
        own, own_slots = scaled[rows], slots[rows]
        observed = np.isfinite(own)
        count, total = (
            sums_by_slot(values, own_slots, steps_per_day) for values in (observed, np.where(observed, own, 0.0))
        )
        several = count > 1
        wider = np.where(several, np.sqrt(count / np.maximum(count - 1, 1)), np.nan)
        deviation[rows] = (own - (total / np.maximum(count, 1))[own_slots]) * wider[own_slots]
    return deviation


def _steps(city: City, hours: int) -> int:
    return max(1, hours * city.steps_per_day // 24)


def _mean_of_observed(x: np.ndarray, axis: int) -> np.ndarray:
    seen = np.isfinite(x)
    return np.where(seen, x, 0.0).sum(axis=axis) / np.maximum(seen.sum(axis=axis), 1)


def _correlation(x: np.ndarray, y: np.ndarray, lag: int) -> np.ndarray:
    """Correlation over time of x(t) and y(t - lag), per region; 0 where fewer than 4 pairs are observed."""
    if lag >= len(x):
        return np.zeros(x.shape[1])
    later, earlier = x[lag:], y[: len(y) - lag]
    both = np.isfinite(later) & np.isfinite(earlier)
    later = np.where(both, later - _mean_of_observed(np.where(both, later, np.nan), 0), 0.0)
    earlier = np.where(both, earlier - _mean_of_observed(np.where(both, earlier, np.nan), 0), 0.0)
    power = np.sqrt((later**2).sum(axis=0) * (earlier**2).sum(axis=0))
    enough = (both.sum(axis=0) >= 4) & (power > 1e-9)
    return np.where(enough, (later * earlier).sum(axis=0) / np.where(enough, power, 1.0), 0.0)


def _neighbour_mean(city: City, x: np.ndarray) -> np.ndarray:
    """Weighted mean over each region's neighbours at every step; NaN where none is observed."""
    weights = np.maximum(city.adjacency(), city.adjacency().T).astype(np.float64)
    seen = np.isfinite(x)
    total = seen @ weights
    return np.where(total > 0, np.where(seen, x, 0.0) @ weights / np.where(total > 0, total, 1.0), np.nan)


def kilometres_between(city: City) -> Float[np.ndarray, "N N"] | None:
    """Distances in km between all regions, on a plane that touches the city; None without coordinates."""
    if city.latitude is None or city.longitude is None:
        return None
    north = city.latitude * 111.2
    east = city.longitude * 111.2 * np.cos(np.deg2rad(city.latitude.mean()))
    return np.hypot(north[:, None] - north[None, :], east[:, None] - east[None, :])


def _spacing(city: City) -> np.ndarray:
    distance = kilometres_between(city)
    if distance is None or city.num_nodes < 2:
        return np.zeros(city.num_nodes)
    fifth = np.sort(distance, axis=1)[:, min(5, city.num_nodes - 1)]
    return np.log((fifth + 1e-3) / (np.median(fifth) + 1e-3))
