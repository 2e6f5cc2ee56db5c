"""In: one-channel cities and what may be seen of them. Out: one flat copy of all series, and windows gathered from it.

Series of all cities lie end to end, so cities of unequal length share one program and no sliding window is ever made.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gpdiff_jax.cities.calendar import NUM_CALENDAR, calendar_features, is_weekend, slot_of_day
from gpdiff_jax.cities.city import City
from gpdiff_jax.cities.expectation import Expectation, expectation
from gpdiff_jax.cities.scaling import Visible, hardly_read, region_scales
from gpdiff_jax.cities.splits import Span
from gpdiff_jax.errors import InputError
from gpdiff_jax.models.protocol import ModelSizes, Window
from gpdiff_jax.training.memory import check_room

COVARIATES = ("none", "calendar", "profile")
_NUM_EXPECTED = 4


@flax.struct.dataclass
class SeriesBank:
    """The series of all nodes of all cities, with the scales and profiles that windows are seen through.

    M is the number of nodes over all cities, V the number of variants: what a forecaster may know of a region besides
    the window itself. For a source, a variant is a random window of its training span, as long as the support days or
    of random length; for a target, the support days less one, less two in a row, and all of them.
    """

    values: Float[Array, "*devices total"]  # data units, 0 where missing; node-major
    observed: Float[Array, "*devices total"]  # 1 where observed
    node_offset: Int[Array, "*devices nodes"]  # where a node's series begins in `values`
    calendar: Float[Array, "*devices steps F"]
    weekend: Float[Array, "*devices steps"]  # 1, 0, or 0.5 where unknown
    slot: Int[Array, "*devices steps"]  # step of the day
    city_offset: Int[Array, "*devices nodes"]  # where a node's city begins in `calendar`
    mean: Float[Array, "*devices V nodes"]  # data units
    std: Float[Array, "*devices V nodes"]  # data units
    # What a variant leads one to expect, scaled, by kind of day (0 weekday, 1 weekend); see `cities.expectation`. One
    # step of the day where no profile is used.
    profile: Float[Array, "*devices V nodes 2 steps_per_day"]
    log_deviation: Float[Array, "*devices V nodes 2 steps_per_day"]
    same_kind: Float[Array, "*devices V nodes 2 steps_per_day"]
    covariates: str = flax.struct.field(pytree_node=False)
    history: int = flax.struct.field(pytree_node=False)
    horizon: int = flax.struct.field(pytree_node=False)

    @property
    def num_covariates(self) -> int:
        """F, the number of covariates at every step."""
        return num_covariates(self.covariates)

    @property
    def num_inputs(self) -> int:
        """I, the number of inputs per node and history step."""
        return 5 if self.has_profile else 2

    @property
    def has_profile(self) -> bool:
        """Whether what the visible days lead one to expect is among the covariates."""
        return self.covariates == "profile"


def num_covariates(covariates: str) -> int:
    """Number of covariates per step of a choice: 0, 20 or 24.

    Raises:
      InputError: unknown choice.
    """
    if covariates not in COVARIATES:
        raise InputError(f"`covariates` must be one of {', '.join(COVARIATES)}, got {covariates!r}")
    return {"none": 0, "calendar": NUM_CALENDAR, "profile": NUM_CALENDAR + _NUM_EXPECTED}[covariates]


def model_sizes(bank: SeriesBank) -> ModelSizes:
    """The sizes of a model that reads windows of this bank."""
    return ModelSizes(bank.history, bank.horizon, bank.num_inputs, bank.num_covariates, anomaly=bank.has_profile)


def build_bank(
    cities: Sequence[City],
    scaled_by: Sequence[Sequence[Visible]],
    profile_masks: Sequence[Bool[np.ndarray, "V _"]],
    *,
    covariates: str,
    history: int,
    horizon: int,
) -> SeriesBank:
    """Puts the series of several cities side by side on the device, with their scales and covariates.

    Args:
      cities: one-channel cities of one interval.
      scaled_by: per city, for each of the V variants the steps whose mean and deviation scale every region.
      profile_masks: per city, the time steps that enter each of the V variants of its daily profile.
      covariates: "none", "calendar" or "profile".
      history: H, steps that a model sees.
      horizon: P, steps that it forecasts.

    Returns:
      The bank; nodes are numbered through, city after city.

    Raises:
      InputError: no city, unknown covariates, more than one channel, intervals that differ, a span without a reading,
        or a profile asked for windows longer than a day.
    """
    sizes: Any = {"covariates": covariates, "history": history, "horizon": horizon}
    arrays = jax.device_put(bank_arrays(cities, scaled_by, profile_masks, **sizes))
    return SeriesBank(**arrays, **sizes)


def bank_arrays(
    cities: Sequence[City],
    scaled_by: Sequence[Sequence[Visible]],
    profile_masks: Sequence[Bool[np.ndarray, "V _"]],
    *,
    covariates: str,
    history: int,
    horizon: int,
) -> dict[str, np.ndarray]:
    """The arrays of `build_bank`, on the host."""
    num_covariates(covariates)
    _check_cities(cities, covariates, history + horizon)
    _check_room(cities, len(profile_masks[0]), covariates)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in _BANK_ARRAYS}
    total = steps = 0
    for city, scaling, masks in zip(cities, scaled_by, profile_masks, strict=True):
        readings = city.values[:, :, 0]
        weekend = is_weekend(city)
        weekend_step = np.full(city.num_steps, 0.5) if weekend is None else weekend.astype(np.float64)
        mean, std = (np.stack(moment) for moment in zip(*(region_scales(city, own) for own in scaling), strict=True))
        parts["values"].append(np.where(np.isfinite(readings), readings, 0.0).T.reshape(-1))
        parts["observed"].append(np.isfinite(readings).T.reshape(-1))
        parts["node_offset"].append(total + city.num_steps * np.arange(city.num_nodes))
        parts["calendar"].append(calendar_features(city)[:, : 0 if covariates == "none" else None])
        parts["weekend"].append(weekend_step)
        parts["slot"].append(slot_of_day(city))
        parts["city_offset"].append(np.full(city.num_nodes, steps))
        parts["mean"].append(mean)
        parts["std"].append(std)
        expected = [
            scaled_expectation(city, mask, m, s) if covariates == "profile" else _nothing(city)
            for mask, m, s in zip(masks, mean, std, strict=True)
        ]
        profile, deviation, same_kind = (np.stack(values).swapaxes(1, 2) for values in zip(*expected, strict=True))
        parts["profile"].append(profile)
        parts["log_deviation"].append(np.log(deviation))
        parts["same_kind"].append(same_kind)
        for name, dtype in _BANK_ARRAYS.items():
            parts[name][-1] = parts[name][-1].astype(dtype)  # at once, in half the memory
        total += city.num_steps * city.num_nodes
        steps += city.num_steps
    # The parts of an array are given up as it is joined.
    return {name: np.concatenate(parts.pop(name), axis=1 if name in PER_VARIANT else 0) for name in _BANK_ARRAYS}


def _check_room(cities: Sequence[City], variants: int, covariates: str) -> None:
    """Raises where the bank cannot be: its places are no 32-bit numbers, or it does not fit in memory."""
    readings = sum(city.num_steps * city.num_nodes for city in cities)
    if readings >= 2**31:
        raise InputError(f"the cities hold {readings} readings, more than 2^31; use fewer regions or a longer interval")
    regions = sum(city.num_nodes for city in cities)
    slots = cities[0].steps_per_day if covariates == "profile" else 1
    clock = sum(city.num_steps for city in cities) * (2 + (0 if covariates == "none" else NUM_CALENDAR))
    numbers = 2 * readings + clock + variants * regions * (2 + 3 * 2 * slots)
    check_room(4 * numbers, f"the series of {regions} regions, seen through {variants} windows each,")


def _check_cities(cities: Sequence[City], covariates: str, window: int) -> None:
    if not cities:
        raise InputError("`cities` is empty; name at least one city")
    first = cities[0]
    for city in cities:
        if city.num_channels != 1:
            raise InputError(f"city {city.name!r} has {city.num_channels} channels; select one of {city.feature_names}")
        if city.interval_minutes != first.interval_minutes:
            raise InputError(
                f"city {city.name!r} has an interval of {city.interval_minutes} minutes and {first.name!r} one of "
                f"{first.interval_minutes}; resample them to a common interval (--interval_minutes)"
            )
    if covariates == "profile" and window > first.steps_per_day:
        raise InputError(
            f"covariates 'profile' need history + horizon (={window} steps) within a day of {first.steps_per_day} "
            "steps, or the profile would hold what it helps to predict; use a shorter interval or 'calendar'"
        )


_BANK_ARRAYS = {
    "values": np.float32,
    "observed": np.float32,
    "node_offset": np.int32,
    "calendar": np.float32,
    "weekend": np.float32,
    "slot": np.int32,
    "city_offset": np.int32,
    "mean": np.float32,
    "std": np.float32,
    "profile": np.float32,
    "log_deviation": np.float32,
    "same_kind": np.float32,
}
PER_VARIANT = ("mean", "std", "profile", "log_deviation", "same_kind")  # what a window is seen through


def scaled_expectation(
    city: City, visible: Visible, mean: Float[np.ndarray, " N"], std: Float[np.ndarray, " N"]
) -> Expectation:
    """What the visible readings of a city lead one to expect of its regions, scaled.

    Args:
      city: one channel.
      visible: the steps that are seen.
      mean: of every region, see `region_scales`.
      std: of every region.

    Returns:
      Of regions that were hardly read, what their neighbours lead one to expect.
    """
    steps = slice(visible.start, visible.stop) if isinstance(visible, Span) else visible
    weekend = is_weekend(city)
    readings, seen = (city.values[steps, :, 0] - mean) / std, None if weekend is None else weekend[steps]
    found = expectation(readings, slot_of_day(city)[steps], seen, city.steps_per_day)
    return found.filled(hardly_read(city, visible), city)


def _nothing(city: City) -> Expectation:
    one = np.ones((2, city.num_nodes, 1), np.float32)
    return Expectation(np.zeros_like(one), one, one)


def gather_window(
    bank: SeriesBank,
    nodes: Int[Array, " N"],
    start: Int[Array, ""],
    variant: Int[Array, ""],
    shift: Int[Array, ""] | None = None,
) -> Window:
    """Reads one window of one region graph off the bank.

    Args:
      bank: the series.
      nodes: [N], bank numbers of the nodes of the region graph, the centre first.
      start: time step of the first history step, within the city of the nodes.
      variant: the variant of scale and profile that the window is seen through.
      shift: steps by which the calendar is read off its place, as if the same readings came on another day.

    Returns:
      The window, scaled by each node's own statistics.
    """
    steps = start + jnp.arange(bank.history + bank.horizon, dtype=jnp.int32)
    past, ahead = steps[: bank.history], steps[bank.history :]
    mean, std = bank.mean[variant, nodes], bank.std[variant, nodes]
    reach = bank.node_offset[nodes][:, None] + past[None, :]
    observed = bank.observed[reach]
    history = jnp.stack([observed * (bank.values[reach] - mean[:, None]) / std[:, None], observed], -1)
    clock = bank.city_offset[nodes[0]] + steps
    if shift is not None:
        clock = clock + shift
    covariates = bank.calendar[clock]
    if bank.has_profile:
        # Where the calendar is unknown, both kinds of day lead to expect the same.
        kind, slot = (bank.weekend[clock] > 0.5).astype(jnp.int32), bank.slot[clock]
        profile, log_deviation = (
            of_kind[variant, nodes[:, None], kind[None, :], slot[None, :]]
            for of_kind in (bank.profile, bank.log_deviation)
        )
        other = (bank.profile[variant, nodes[0], 1 - kind, slot] - profile[0]) * jnp.exp(-log_deviation[0])
        before = profile[:, : bank.history], log_deviation[:, : bank.history]
        anomaly = observed * (history[..., 0] - before[0]) * jnp.exp(-before[1])
        history = jnp.concatenate([history, jnp.stack([anomaly, *before], axis=-1)], axis=-1)
        same_kind = bank.same_kind[variant, nodes[0], kind, slot]
        expected = jnp.stack([other, log_deviation[0], profile[0], same_kind], axis=-1)
        covariates = jnp.concatenate([covariates, expected], axis=-1)
    future = bank.node_offset[nodes[0]] + ahead
    mask = bank.observed[future]
    target = mask * (bank.values[future] - mean[0]) / std[0]
    return Window(history, covariates, target, mask)
