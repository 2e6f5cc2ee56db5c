"""In: parameters of a tiny model for the regions of a simulated city. Out: its next hours, and what they depend on."""

import dataclasses

import jax
import numpy as np
import pandas as pd
import pytest

import gpdiff_jax as gpd
from gpdiff_jax.cities.city import City
from gpdiff_jax.data.target import prepare_target
from gpdiff_jax.errors import InputError
from gpdiff_jax.run import next_table
from gpdiff_jax.run.next_table import write_next
from gpdiff_jax.transfer.evaluate import zero_shot
from gpdiff_jax.transfer.next_hours import until
from tests.tiny import tiny_parameters

_DATA = gpd.DataConfig(covariates="profile", max_neighbours=3)


@pytest.fixture(name="city")
def _city(simulated_cities: list[City]) -> City:
    return simulated_cities[1]


def _parameters(city: City) -> gpd.RegionParameters:
    return tiny_parameters(city, _DATA)


def test_the_next_hours_are_the_window_after_the_last_reading(city):
    # A target's first test window begins where its support ends; the series is cut there.
    target = prepare_target(city, _DATA)
    cut = dataclasses.replace(city, values=city.values[: target.split.support.stop])
    parameters = _parameters(city)
    made = gpd.forecast_next(parameters, cut)
    first = int(np.asarray(target.test_starts)[0])
    assert first + 12 == cut.num_steps
    want = zero_shot(gpd.make_model("tiny", target.sizes), target, parameters.params)
    np.testing.assert_allclose(made.forecast, want.forecast[0], rtol=1e-5)
    assert made.spread is not None and made.spread.shape == made.forecast.shape == (city.num_nodes, 6)
    assert made.times is not None and city.start is not None
    np.testing.assert_array_equal(made.times, city.start + (cut.num_steps + np.arange(6)) * np.timedelta64(60, "m"))


@pytest.mark.parametrize("adapt", [None, gpd.AdaptConfig(code_steps=2, directions=2, shared_steps=3)])
def test_what_is_read_after_now_changes_no_bit(city, adapt):
    parameters, now = _parameters(city), city.start + np.timedelta64(100, "h")
    values = np.array(city.values)
    values[100:] = 1e6 * np.random.default_rng(0).uniform(size=values[100:].shape)
    values[:, 2][100:] = np.nan
    other = dataclasses.replace(city, values=values)
    made = [gpd.forecast_next(parameters, one, at=now, adapt=adapt, key=jax.random.key(1)) for one in (city, other)]
    np.testing.assert_array_equal(made[0].forecast, made[1].forecast)
    np.testing.assert_array_equal(made[0].spread, made[1].spread)
    assert made[0].quantiles is not None
    np.testing.assert_array_equal(made[0].quantiles, made[1].quantiles)
    assert made[0].times is not None and made[0].times[0] == now
    # What was read before does.
    values = np.array(city.values)
    values[99] += 50
    changed = gpd.forecast_next(parameters, dataclasses.replace(city, values=values), at=now, adapt=adapt)
    assert (changed.forecast != made[0].forecast).mean() > 0.5


def test_an_hour_that_is_not_over_and_late_readings(city):
    parameters, now = _parameters(city), city.start + np.timedelta64(100, "h")
    within = gpd.forecast_next(parameters, city, at=now + np.timedelta64(59, "m"))
    np.testing.assert_array_equal(within.forecast, gpd.forecast_next(parameters, city, at=now).forecast)
    late = dataclasses.replace(city, values=np.array(city.values[:98]))
    missing = np.array(city.values[:100])
    missing[98:] = np.nan
    np.testing.assert_array_equal(
        gpd.forecast_next(parameters, late, at=now).forecast,
        gpd.forecast_next(parameters, dataclasses.replace(city, values=missing)).forecast,
    )


@pytest.mark.parametrize("hours", [24, 30, 72, 100])
def test_a_day_is_enough_and_of_more_than_the_generator_knows_the_last_are_taken(city, hours):
    parameters = _parameters(city)
    values = np.array(city.values[:hours])
    values[:, 4] = np.nan  # a region without a reading
    made = gpd.forecast_next(parameters, dataclasses.replace(city, values=values))
    assert np.isfinite(made.forecast).all() and (made.forecast >= 0).all()
    if hours == 100:
        values[: 100 - 72] = np.nan
        again = gpd.forecast_next(parameters, dataclasses.replace(city, values=values))
        np.testing.assert_array_equal(made.forecast, again.forecast)


def test_what_cannot_be_forecast_is_named(city):
    parameters, start = _parameters(city), city.start
    with pytest.raises(InputError, match="has 23 steps before what is forecast, and a day takes 24"):
        gpd.forecast_next(parameters, dataclasses.replace(city, values=city.values[:23]))
    for at in (start, start + np.timedelta64(city.num_steps + 25, "h")):
        with pytest.raises(InputError, match=r"`at` \(=.*\) must lie between .* bring the readings up to date"):
            until(city, at)
    with pytest.raises(InputError, match="has no start, so `at`"):
        until(dataclasses.replace(city, start=None), start)
    turned = dataclasses.replace(city, node_ids=city.node_ids[::-1])
    with pytest.raises(InputError, match="parameters hold for their own regions in their own order"):
        gpd.forecast_next(parameters, turned)
    with pytest.raises(InputError, match="has a reading every 120 minutes, and the generator forecasts every 60; give"):
        gpd.forecast_next(parameters, dataclasses.replace(city, interval_minutes=120))


def test_the_table_has_a_row_for_every_region_and_step(city, tmp_path, monkeypatch):
    made = gpd.forecast_next(_parameters(city), city)
    assert made.times is not None
    write_next(tmp_path / "next.csv", made)
    table = pd.read_csv(tmp_path / "next.csv")
    assert list(table.columns) == ["unique_id", "ds", "mean", "q05", "q25", "q50", "q75", "q95"]
    assert made.quantiles is not None
    np.testing.assert_allclose(table.iloc[:, 3:].to_numpy().reshape(-1, 6, 5), made.quantiles, rtol=1e-5)
    assert table.unique_id.tolist() == [name for name in city.node_ids for _ in range(6)]
    assert table.ds.tolist() == made.times.astype(str).tolist() * city.num_nodes
    np.testing.assert_allclose(table["mean"].to_numpy().reshape(-1, 6), made.forecast, rtol=1e-5)
    with monkeypatch.context() as without:
        without.setattr(next_table.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(InputError, match=r"`out_file` \(=.*next.parquet\) is Parquet, which needs pyarrow; pip"):
            next_table.check_table_name(tmp_path / "next.parquet")
    pytest.importorskip("pyarrow")
    write_next(tmp_path / "next.parquet", made)
    held = pd.read_parquet(tmp_path / "next.parquet")
    np.testing.assert_array_equal(held["ds"].to_numpy("datetime64[m]")[:6], made.times)
    np.testing.assert_array_equal(held["mean"].to_numpy(np.float32).reshape(-1, 6), made.forecast)
    with pytest.raises(InputError, match=r"`out_file` .* is no table; name it .csv or .parquet"):
        write_next(tmp_path / "next.txt", made)
    with pytest.raises(InputError, match="its folder does not exist"):
        write_next(tmp_path / "none" / "next.csv", made)


def test_a_first_day_that_is_nearly_whole_is_a_day(city):
    parameters, values = _parameters(city), np.array(city.values[:72])
    values[:10] = np.nan
    late = dataclasses.replace(city, values=values[10:], start=city.start + np.timedelta64(10, "h"))
    whole = gpd.forecast_next(parameters, dataclasses.replace(city, values=values))
    np.testing.assert_array_equal(gpd.forecast_next(parameters, late).forecast, whole.forecast)
    # Of less than half of one, nothing is taken.
    later = dataclasses.replace(city, values=values[13:], start=city.start + np.timedelta64(13, "h"))
    two = dataclasses.replace(city, values=values[24:], start=city.start + np.timedelta64(24, "h"))
    made = [gpd.forecast_next(parameters, one).forecast for one in (later, two)]
    np.testing.assert_array_equal(*made)
    assert (made[0] != whole.forecast).any()
