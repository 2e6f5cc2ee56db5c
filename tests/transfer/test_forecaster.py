"""In: a city whose readings come one by one. Out: the same next hours as if all had been there, and no new program."""

import dataclasses
import datetime

import jax
import numpy as np
import pytest

import gpdiff_jax as gpd
from gpdiff_jax.cities.city import City
from gpdiff_jax.cities.recent import RecentReadings
from gpdiff_jax.data.target import split_city
from gpdiff_jax.errors import InputError, NotFiniteError
from gpdiff_jax.transfer.codes import share_of_windows
from gpdiff_jax.transfer.next_hours import days_of, forecast_target, until, windows_ahead, with_whole_days
from tests.compilations import programs_made
from tests.tiny import tiny_parameters

_DATA = gpd.DataConfig(covariates="profile", max_neighbours=3, window_days=(1, 5))
_HOUR = np.timedelta64(60, "m")


@pytest.fixture(name="city")
def _city(simulated_cities: list[City]) -> City:
    return simulated_cities[1]


def _parameters(city: City) -> gpd.RegionParameters:
    residuals = np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32)
    return tiny_parameters(city, _DATA, residuals=residuals)


def _first(city: City, hours: int) -> City:
    return dataclasses.replace(city, values=np.array(city.values[:hours]))


_CODES = gpd.AdaptConfig(code_steps=2, code_rate=0.3, directions=2, shared_steps=3)


@pytest.mark.parametrize(("hours", "gap"), [(24, 0), (31, 0), (60, 0), (72, 0), (72, 30), (130, 0)])
@pytest.mark.parametrize("adapt", [None, _CODES, gpd.AdaptConfig(update="shared", shared_steps=3)])
def test_forecasts_are_those_of_a_target_whose_last_window_they_are(city, hours, gap, adapt):
    parameters, short = _parameters(city), _first(city, hours)
    short.values[:, 4] = np.nan  # a region without a reading
    short.values[10 : 10 + gap] = np.nan  # fewer windows than three whole days have
    read = with_whole_days(short, _DATA)
    data = dataclasses.replace(_DATA, support_days=days_of(read, _DATA))
    ahead = windows_ahead(read, data)
    target = split_city(ahead.city, data, ahead.split, ahead.starts)
    assert hours < 30 or (share_of_windows(target) < 1) == (gap > 0)
    want = forecast_target(parameters, target, adapt, jax.random.key(1))
    made = gpd.Forecaster(parameters, short, adapt=adapt, key=jax.random.key(1)).forecast()
    np.testing.assert_allclose(made.forecast, want.forecast[0], rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(made.spread, want.spread[0], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(made.quantiles, want.quantiles[0], rtol=1e-4, atol=1e-4)
    assert made.times is not None and made.times[0] == short.start + hours * _HOUR


def test_readings_in_any_order_give_what_they_give_at_once_and_compile_nothing(city):
    parameters = _parameters(city)
    forecaster = gpd.Forecaster(parameters, _first(city, 24))  # of a single day nothing can be judged yet
    forecaster.forecast()
    times = city.start + np.arange(24, 140) * _HOUR
    values = np.array(city.values[24:140, :, 0])
    values[36:39] = np.nan
    order = np.random.default_rng(0).permutation(116)
    with programs_made() as made:
        for some in np.array_split(order, 7):
            forecaster.update(times[some], values[some])
            forecaster.forecast()
        forecaster.refresh()
        found = forecaster.forecast()
    assert not made
    assert forecaster.end == city.start + 140 * _HOUR
    whole = np.array(city.values[:140])
    whole[60:63] = np.nan
    at_once = gpd.Forecaster(parameters, dataclasses.replace(city, values=whole))
    for one, other in zip(found[:3], at_once.forecast()[:3], strict=True):
        np.testing.assert_array_equal(one, other)
    # Late readings count, and a gap says nothing of what is known.
    forecaster.update(times[36:39], city.values[60:63, :, 0])
    forecaster.update(times, np.full_like(values, np.nan))
    late = forecaster.forecast()
    assert (late.forecast != found.forecast).any()
    np.testing.assert_array_equal(late.forecast, gpd.Forecaster(parameters, _first(city, 140)).forecast().forecast)


def test_now_may_be_later_than_the_last_reading(city):
    parameters, now = _parameters(city), city.start + 103 * _HOUR
    made = gpd.Forecaster(parameters, _first(city, 100)).forecast(now)
    np.testing.assert_array_equal(made.times, now + np.arange(6) * _HOUR)
    np.testing.assert_array_equal(made.forecast, gpd.forecast_next(parameters, _first(city, 100), at=now).forecast)
    with pytest.raises(InputError, match=r"`at` \(=.*\) must lie between .*, where the readings of city .* end, and a"):
        gpd.Forecaster(parameters, city).forecast(city.start)


def test_an_hour_that_is_read_in_part_counts_when_now_is_later():
    fine = gpd.simulate_cities(gpd.SimulationConfig(cities=1, regions=8, days=4, interval_minutes=15), seed=3)[0]
    parameters = _parameters(gpd.resample(fine, 60))
    city, now = _first(fine, 4 * 60 + 3), fine.start + 61 * _HOUR
    made = gpd.Forecaster(parameters, city).forecast(now)
    np.testing.assert_array_equal(made.forecast, gpd.forecast_next(parameters, city, at=now).forecast)
    np.testing.assert_array_equal(made.times, now + np.arange(6) * _HOUR)
    # Of its three quarters two are enough, one is not.
    less = gpd.Forecaster(parameters, _first(fine, 4 * 60 + 1)).forecast(now)
    assert (less.forecast != made.forecast).any()


def test_days_before_those_that_were_known_count_too(city):
    parameters, values = _parameters(city), city.values[:120, :, 0]
    young = dataclasses.replace(_first(city, 120), values=np.array(city.values[96:120]), start=city.start + 96 * _HOUR)
    forecaster = gpd.Forecaster(parameters, young)
    forecaster.update(city.start + np.arange(96) * _HOUR, values[:96])
    forecaster.refresh()
    want = gpd.Forecaster(parameters, _first(city, 120)).forecast()
    for one, other in zip(forecaster.forecast()[:3], want[:3], strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_city_without_a_start_is_brought_to_the_generators_interval_too():
    fine = gpd.simulate_cities(gpd.SimulationConfig(cities=1, regions=8, days=4, interval_minutes=15), seed=3)[0]
    fine = dataclasses.replace(fine, start=None)
    hourly = gpd.resample(fine, 60)
    parameters = _parameters(hourly)
    made = [gpd.forecast_next(parameters, one) for one in (fine, hourly)]
    np.testing.assert_array_equal(made[0].forecast, made[1].forecast)
    assert made[0].times is None


def test_readings_of_a_shorter_interval_are_brought_to_the_generators():
    fine = gpd.simulate_cities(gpd.SimulationConfig(cities=1, regions=8, days=6, interval_minutes=15), seed=3)[0]
    # Bins lie on the local clock, and the series begins within one.
    city = dataclasses.replace(fine, values=fine.values[3:])
    city = dataclasses.replace(city, start=fine.start + np.timedelta64(45, "m"))
    hourly = gpd.resample(city, 60)
    parameters = _parameters(hourly)
    short = dataclasses.replace(city, values=np.array(city.values[: 4 * 60]))
    forecaster = gpd.Forecaster(parameters, short)
    step = np.timedelta64(15, "m")
    for first, last in ((4 * 60, 4 * 60 + 1), (4 * 60 + 1, 4 * 60 + 30), (4 * 60 + 30, 4 * 60 + 111)):
        times = city.start + np.arange(first, last) * step
        forecaster.update(times, city.values[first:last, :, 0])
        now = until(hourly, times[-1] + step)
        assert forecaster.end == times[-1] + step - (times[-1] + step - hourly.start) % _HOUR
        want = gpd.Forecaster(parameters, now).forecast()
        forecaster.refresh()
        np.testing.assert_array_equal(forecaster.forecast().forecast, want.forecast)
        np.testing.assert_array_equal(forecaster.forecast().times, want.times)


def test_what_cannot_be_taken_is_named_and_nothing_is_changed(city):
    forecaster = gpd.Forecaster(_parameters(city), _first(city, 72))
    before, row = forecaster.forecast(), np.ones((1, city.num_nodes), np.float32)
    end = forecaster.end
    second, negative, infinite, far = np.repeat(row, 2, axis=0), row.copy(), row.copy(), row.copy()
    negative[0, 3], infinite[0, 3], far[0, 3] = -1, np.inf, 2147483647
    region = rf"the reading of region '{city.node_ids[3]}' at {end} \(=.*\)"
    for times, readings, message in (
        ([end], row[:, :-1], r"`readings` \(1, \d+\) must be \(1, \d+\): a row for each of the times"),
        ([end, end + np.timedelta64(61, "m")], second, "where no interval of 60 minutes of city .* begins"),
        ([end, end + np.timedelta64(3601, "s")], second, "where no interval of 60 minutes of city .* begins"),
        ([end, end + np.timedelta64(6, "D")], second, "more than 5 days after .* check the clock"),
        ([end, np.datetime64("NaT", "m")], second, "`times` are unknown in row 1"),
        (np.asarray(["yesterday"]), row, "`times` are no local times"),
        (np.asarray(["2024-05-03T17:00+02:00"]), row, "`times` are no local times .* of the city's clocks"),
        (np.asarray([datetime.datetime.now(datetime.UTC)]), row, "`times` are no local times"),
        ([end], negative, f"{region} is negative"),
        ([end], infinite, f"{region} is infinite"),
        ([end], far, f"{region} is far beyond all that the city reads; .* with `missing_above`"),
    ):
        with pytest.raises(InputError, match=message):
            forecaster.update(times, readings)
    np.testing.assert_array_equal(forecaster.forecast().forecast, before.forecast)
    forecaster.update([end - np.timedelta64(40, "D")], row)  # long over
    np.testing.assert_array_equal(forecaster.forecast().forecast, before.forecast)
    with pytest.raises(InputError, match="has no start, so what was read last is unknown"):
        gpd.Forecaster(_parameters(city), dataclasses.replace(city, start=None))
    with pytest.raises(InputError, match="has 23 steps before what is forecast, and a day takes 24"):
        gpd.Forecaster(_parameters(city), _first(city, 23))


def test_a_refresh_that_leaves_the_numbers_changes_no_forecast(city, monkeypatch):
    forecaster = gpd.Forecaster(_parameters(city), _first(city, 72), adapt=_CODES)
    before = forecaster.forecast()
    # Other days would be judged otherwise: with these readings and without an error, the quantiles are others.
    forecaster.update([forecaster.end - np.timedelta64(5, "h")], 3 * city.values[67:68, :, 0])
    changed = forecaster.forecast()
    monkeypatch.setattr("gpdiff_jax.transfer.forecaster.adapt", _not_finite)
    with pytest.raises(NotFiniteError, match=r"^lower the rate$"):
        forecaster.refresh()
    np.testing.assert_array_equal(forecaster.forecast().quantiles, changed.quantiles)
    monkeypatch.undo()
    forecaster.refresh()
    assert not np.array_equal(forecaster.forecast().quantiles, changed.quantiles)
    assert not np.array_equal(before.forecast, changed.forecast)


def _not_finite(*_, **__):
    raise NotFiniteError("lower the rate")


def test_above_a_limit_readings_are_missing(city):
    recent = RecentReadings(_first(city, 130), 60, 5, missing_above=1e6)
    row = np.full((1, city.num_nodes), 2147483647, np.float32)
    row[0, 0] = 3
    recent.add([recent.end], row)
    last = recent.last_days()[-1]
    assert last[0] == 3 and np.isnan(last[1:]).all()
    # What lies below it is taken as it is, however far beyond the others.
    row[:] = 9e5
    recent.add([recent.end], row)
    np.testing.assert_array_equal(recent.last_days()[-1], row[0])


def test_what_a_mask_hides_is_no_reading(city):
    recent, masked = (RecentReadings(_first(city, 130), 60, 5) for _ in range(2))
    row = np.full((1, city.num_nodes), 3, np.float32)
    hidden = np.arange(city.num_nodes)[None] % 2 == 0
    masked.add([masked.end], np.ma.masked_array(row, hidden))
    recent.add([recent.end], np.where(hidden, np.nan, row))
    np.testing.assert_array_equal(masked.last_days(), recent.last_days())
    with pytest.raises(InputError, match="`missing_above` must be at least 0, got nan"):
        RecentReadings(_first(city, 130), 60, 5, missing_above=float("nan"))


def test_a_speed_of_zero_is_no_reading(city):
    short = _first(city, 72)
    roads = dataclasses.replace(short, kind="speed", values=np.maximum(short.values, 1))
    recent, row = RecentReadings(roads, 60, 5), np.full((1, city.num_nodes), 50, np.float32)
    row[0, 2] = 0
    with pytest.raises(InputError, match=rf"region '{city.node_ids[2]}' at .* \(=0\) is a speed of zero"):
        recent.add([recent.end], row)


def test_a_region_that_never_fills_half_an_hour_does_not_stop_the_others(city):
    values = np.repeat(city.values[:72], 4, axis=0) / 4
    values[:, 3] = np.nan
    values[101, 3] = 5.0
    quarters = dataclasses.replace(city, values=values, interval_minutes=15)
    made = gpd.forecast_next(_parameters(city), quarters)
    silent = _first(city, 72)
    silent.values[:, 3] = np.nan
    np.testing.assert_allclose(made.forecast, gpd.forecast_next(_parameters(city), silent).forecast, rtol=1e-5)


def test_after_a_long_gap_nothing_is_forecast_before_half_a_day_was_read(city):
    forecaster = gpd.Forecaster(_parameters(city), _first(city, 130))
    later = forecaster.end + np.timedelta64(4 * 24 + 20, "h")
    values = np.array(city.values[:12, :, 0])
    forecaster.update([later], values[:1])
    for make in (forecaster.forecast, forecaster.refresh):
        with pytest.raises(InputError, match=r"was read in 4 of the 120 intervals before .*, half a day takes 12"):
            make()
    forecaster.update(later + np.arange(12) * _HOUR, values)
    assert np.isfinite(forecaster.forecast().forecast).all()


def test_the_last_of_two_rows_of_one_time_holds(city):
    recent = RecentReadings(_first(city, 130), 60, 5)
    rows = np.stack([np.full(city.num_nodes, value, np.float32) for value in (1, 2)])
    rows[1, 0] = np.nan
    recent.add([recent.end, recent.end], rows)
    last = recent.last_days()[-1]
    assert last[0] == 1 and (last[1:] == 2).all()
