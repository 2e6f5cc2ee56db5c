"""In: parameters of a city's regions, and its readings as they come. Out: its next hours, at any time, at once.

All arrays keep their sizes, however many days were read, so that nothing is compiled after the first forecast (but for
fine-tuning anew, see `Forecaster.refresh`).
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from gpdiff_jax.cities.city import City
from gpdiff_jax.cities.recent import RecentReadings, nearly_whole_days
from gpdiff_jax.cities.splits import Span, TargetSplit, split_before
from gpdiff_jax.data.region_graphs import region_graphs
from gpdiff_jax.data.series import PER_VARIANT
from gpdiff_jax.data.target import Target, newest_target, region_windows, split_city
from gpdiff_jax.errors import InputError
from gpdiff_jax.models.protocol import Model
from gpdiff_jax.models.registry import make_model
from gpdiff_jax.region_parameters import RegionParameters, check_regions, model_of
from gpdiff_jax.training.caches import bounded_cache
from gpdiff_jax.training.parallel import PlacedRows, ShardedRows, place_rows
from gpdiff_jax.transfer.adapt import adapt
from gpdiff_jax.transfer.adapt_config import AdaptConfig
from gpdiff_jax.transfer.codes import share_of_windows
from gpdiff_jax.transfer.damped import in_data_units, on_seen_kinds, target_forecast
from gpdiff_jax.transfer.next_hours import (
    NextHours,
    at_interval,
    days_of,
    forecast_target,
    most_days,
    next_hours,
    until,
    windows_ahead,
    with_whole_days,
)
from gpdiff_jax.transfer.quantiles import (
    around_forecasts,
    judged_starts,
    most_windows,
    region_deviations,
    region_rows,
    residual_quantiles,
    support_residuals,
)
from gpdiff_jax.typing import Key, Params
from gpdiff_jax.vectors import evenly


class Forecaster:
    """Keeps the last days of a city and the parameters of its regions, and forecasts what comes.

    Example:
      >>> import gpdiff_jax as gpd
      >>> forecaster = gpd.Forecaster(kept.parameters, city)  # doctest: +SKIP
      >>> forecaster.update([np.datetime64("2024-05-03T17:00")], readings)  # doctest: +SKIP
      >>> forecaster.forecast().quantiles.shape  # doctest: +SKIP
      (80, 6, 5)
    """

    def __init__(
        self,
        parameters: RegionParameters,
        city: City,
        *,
        adapt: AdaptConfig | None = None,
        key: Key | None = None,
        missing_above: float | None = None,
    ) -> None:
        """Takes over a city and what it has read, and makes ready.

        Args:
          parameters: generated for its regions.
          city: one channel, of known start, at an interval that divides the generator's. Readings will come at its own.
          adapt: None for zero-shot; else how to fine-tune, now and at every `refresh`.
          key: random key of the fine-tuning.
          missing_above: above which value new readings are missing, and others are taken as they are; None refuses
            those far beyond all others.

        Raises:
          InputError: the parameters are for another city, or for other regions or another order; less than a day was
            read, or less than half of one in the last days; or the start of the city is unknown.
          NotFiniteError: see `refresh`.
        """
        made_for = parameters.city
        minutes = city.interval_minutes if made_for is None else made_for.interval_minutes
        whole = at_interval(city, minutes)
        check_regions(parameters, whole)
        # The parameters themselves are kept where they are to be fine-tuned again, else only on the devices.
        shapes: Any = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), parameters.params)
        self._parameters = parameters if adapt is not None else dataclasses.replace(parameters, params=shapes)
        self._adapt = adapt
        self._key = jax.random.key(0) if key is None else key
        self._most = most_days(parameters.data)
        self._recent = RecentReadings(city, minutes, self._most, missing_above=missing_above)
        # What is known of the city beside its readings.
        self._city = dataclasses.replace(whole, values=whole.values[:1].copy(), start=self._recent.end)
        cut: Any = {"max_neighbours": parameters.data.max_neighbours, "pick": parameters.data.pick_neighbours}
        self._graphs = region_graphs([self._city], **cut)
        self._samples = len(jax.tree.leaves(parameters.params)[0])
        self._rows = self._initial = place_rows(region_rows(parameters.params))
        self._mixed = False
        self._quantiles: np.ndarray | None = None
        self.refresh()

    @property
    def end(self) -> np.datetime64:
        """Local end of the last interval of the generator that is over, where forecasts begin."""
        return self._recent.end

    def update(
        self, times: Shaped[np.ndarray, " T"] | Sequence[np.datetime64], readings: Float[np.ndarray, "T R"]
    ) -> None:
        """Adds readings, or corrects earlier ones.

        Args:
          times: [T], local begin of the interval of every row, in any order; what is older than the days that are kept
            is passed over.
          readings: [T, R] in the city's unit, regions in its order. NaN says nothing but that its time is over: what is
            known of that time stays.

        Raises:
          InputError: names the first time that is none of the city's, or more days after its last than are kept, or the
            first reading that is negative, infinite, a speed of zero or far beyond all others; then nothing is taken.
        """
        self._recent.add(times, readings)

    def refresh(self) -> None:
        """Judges forecasts on the days that are kept now, which the quantiles come from, and fine-tunes anew.

        Once a day is enough; it takes seconds where a forecast takes a tenth of one. Fine-tuning in codes or together
        is compiled once for every power of two of windows in these days, of all weights for every number of days.

        Raises:
          InputError: less than half a day was read in the last days.
          NotFiniteError: see `adapt`; forecasts are made as before the call.
        """
        self._recent.judge_anew()
        city, split = self._seen()
        parameters, per_day = self._parameters, city.steps_per_day
        newest = np.asarray([self._most * per_day - parameters.data.history], np.int32)
        target = split_city(city, parameters.data, split, newest, graphs=self._graphs)
        model = model_of(parameters, target.sizes)
        starts, fixed = judged_starts(target), _of_fixed_size(target, self._most)
        # The window ahead, of which nothing is read, fills up what there is less of.
        filled = _filled(starts, most_windows(target.num_regions), newest[0])
        own = support_residuals(model, fixed, self._initial, filled)[:, : len(starts)]
        quantiles = residual_quantiles(own, len(split.support) // per_day, parameters.residuals)
        if self._adapt is not None:
            config = self._adapt
            if config.update != "own":
                # Of two, four, eight, ... windows, so that few days take no longer than they need and few programs do.
                windows, most = np.asarray(target.support_starts), config.code_windows
                windows = windows[evenly(len(windows), most)]
                if len(windows):
                    windows = _filled(windows, min(1 << (len(windows) - 1).bit_length(), most), newest[0])
                    # What fills them up says nothing of how much was read.
                    share = share_of_windows(target)
                    shared_rates = tuple(rate * share for rate in config.shared_rates)
                    length = config.code_moves(target.bank.has_profile).rate
                    config = dataclasses.replace(config, code_rate=length * share, shared_rates=shared_rates)
                target = dataclasses.replace(fixed, support_starts=jax.device_put(windows))
            known = {"key": self._key, "directions": parameters.directions}
            tuned = adapt(model, config, target, parameters.params, **known)
            self._rows = place_rows(region_rows(tuned.params))
            self._mixed = config.seen_kinds_only and tuned.steps > 0
        self._quantiles = quantiles

    def forecast(self, at: np.datetime64 | None = None) -> NextHours:
        """Forecasts the P steps after the last reading.

        Args:
          at: local time of now, where it is later than the last reading, by a day at most: what was not read up to
            then is missing. None is `end`.

        Returns:
          The forecasts, averaged over the samples, and quantiles of what will be read.

        Raises:
          InputError: `at` is another time; or less than half a day was read in the last days.
        """
        late = 0 if at is None else self._late(at)
        city, split = self._seen(late)
        data = self._parameters.data
        target = newest_target(city, data, split, self._graphs)
        model = make_model(self._parameters.model, target.sizes)
        # Of what lies on the devices already, nothing is copied.
        params, regions = self._rows.rows
        rows = PlacedRows(((params, self._initial.rows[0] if self._mixed else None), regions), self._rows.count)
        forecast, spread, deviation = ShardedRows(_make_next(model), target)(rows).read()
        spread = spread if self._samples > 1 else None
        quantiles = None
        if self._quantiles is not None:
            quantiles = around_forecasts(forecast, deviation, spread, self._quantiles, float(target.floor))
        step = np.timedelta64(city.interval_minutes, "m")
        times = self.end + (late + np.arange(data.horizon)) * step
        return NextHours(forecast, spread, quantiles, times, city.node_ids)

    def _late(self, at: np.datetime64) -> int:
        """By how many steps a moment is later than the last reading."""
        step = np.timedelta64(self._city.interval_minutes, "m")
        late = int((at.astype("datetime64[m]") - self.end) // step)
        if not 0 <= late <= self._city.steps_per_day:
            raise InputError(
                f"`at` (={at}) must lie between {self.end}, where the readings of city {self._city.name!r} end, and a "
                "day after that; bring the readings up to date, or forecast the past by `forecast_next`"
            )
        return late

    def _seen(self, late: int = 0) -> tuple[City, TargetSplit]:
        """The days that are kept and the P steps ahead, always of one length, and which of the days were read."""
        data, per_day = self._parameters.data, self._city.steps_per_day
        values = self._recent.last_days(late)
        ahead = np.full((data.horizon, values.shape[1]), np.nan, np.float32)
        some = int(np.isfinite(values).any(axis=1).sum())
        if 2 * some < per_day:
            raise InputError(
                f"city {self._city.name!r} was read in {some} of the {len(values)} intervals before {self.end}, "
                f"half a day takes {-(-per_day // 2)}; go on when so much was read, or begin with a city read since"
            )
        step, kept = np.timedelta64(self._city.interval_minutes, "m"), len(values)
        city = dataclasses.replace(
            self._city,
            values=np.concatenate([values, ahead])[:, :, None],
            start=self.end + (late - kept) * step,
        )
        read = self._recent.steps + late
        days, last = min(nearly_whole_days(read, per_day), self._most), kept if read >= per_day else read
        known: Any = {"history": data.history, "before": "what is forecast", "name": city.name}
        return city, split_before(Span(last, last + data.horizon), per_day, max(days, 1), **known)


def _filled(starts: Int[np.ndarray, " B"], most: int, filler: np.integer) -> Int[np.ndarray, " X"]:
    """Starts of windows, filled up to so many; all where there are more."""
    return np.concatenate([starts, np.full(max(most - len(starts), 0), filler, starts.dtype)])


def _of_fixed_size(target: Target, most: int) -> Target:
    """A target whose arrays do not depend on how many days were read, nor on which regions are silent.

    Days of which nothing was read are left out like others, which changes nothing. Its windows are to be chosen by
    their starts.
    """
    days = len(target.split.support) // target.steps_per_day
    empty, whole = most - days, 2 * days - 1
    single = [whole] * empty + list(range(days))
    pairs = [whole] * (empty - 1) + [0] * (empty > 0) + list(range(days, whole))
    order = np.asarray([*single, *pairs, whole])
    arrays = {name: np.asarray(getattr(target.bank, name))[order] for name in PER_VARIANT}
    bank = dataclasses.replace(target.bank, **jax.device_put(arrays))
    return dataclasses.replace(target, bank=bank, support_start=jax.device_put(np.int32(0))).bare


@bounded_cache(16)
def _make_next(model: Model) -> partial:
    return partial(_next, model)


def _next(
    model: Model, target: Target, rows: tuple[tuple[Params, Params | None], Array]
) -> tuple[Float[Array, "R P"], Float[Array, "R P"], Float[Array, "R P"]]:
    """Mean and deviation of the samples' forecasts of the last window, and the deviation to be expected of it."""

    def of_region(row: tuple[tuple[Params, Params | None], Array]) -> tuple[Array, Array, Array]:
        samples, region = row
        graph, windows = region_windows(target, region, target.test_starts)

        def of_sample(sample: tuple[Params, Params | None]) -> Array:
            params, initial = sample
            scaled = target_forecast(model, target, params, graph, windows)
            if initial is not None:
                before = target_forecast(model, target, initial, graph, windows)
                scaled = on_seen_kinds(target, scaled, before, windows)
            return in_data_units(target, graph.nodes[0], scaled)[0]

        drawn = jax.vmap(of_sample)(samples)
        return drawn.mean(axis=0), drawn.std(axis=0), region_deviations(target, graph, windows)[0]

    # Every weight is read once and used once: what counts is that it is read in a line.
    return jax.vmap(of_region)(rows)


def forecast_next(
    parameters: RegionParameters,
    city: City,
    *,
    at: np.datetime64 | None = None,
    adapt: AdaptConfig | None = None,
    key: Key | None = None,
) -> NextHours:
    """Forecasts the P steps after a city's last reading.

    Args:
      parameters: generated for its regions, now or some time ago.
      city: one channel, at an interval that divides the generator's. Its last days are the support, as many as the
        generator was trained for, or as there are; regions that show nothing there are seen as their neighbours are.
      at: local time of now; nothing that was read later is looked at. None takes all readings.
      adapt: None for zero-shot; else how to fine-tune on the support.
      key: random key of the fine-tuning.

    Returns:
      The forecasts, averaged over the samples, and quantiles of what will be read.

    Raises:
      InputError: the parameters are for another city, or for other regions or another order; less than a day was read;
        see `at_interval` and `until`.
      NotFiniteError: fine-tuning left the numbers.

    Example:
      >>> import gpdiff_jax as gpd
      >>> made = gpd.forecast_next(kept.parameters, city, at=np.datetime64("2024-05-03T17:00"))  # doctest: +SKIP
    """
    read = city if at is None else until(city, at)
    if read.start is not None:
        # Of arrays whose sizes do not depend on how much was read, so that no length is compiled anew.
        return Forecaster(parameters, read, adapt=adapt, key=key).forecast()
    if parameters.city is not None:
        read = at_interval(read, parameters.city.interval_minutes)
    check_regions(parameters, read)
    read = with_whole_days(read, parameters.data)
    data = dataclasses.replace(parameters.data, support_days=days_of(read, parameters.data))
    ahead = windows_ahead(read, data)
    target = split_city(ahead.city, data, ahead.split, ahead.starts)
    made = forecast_target(parameters, target, adapt, key)
    return next_hours(made, ahead.city, np.arange(read.num_steps, ahead.city.num_steps))
