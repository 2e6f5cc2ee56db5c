"""In: readings with fill values, and with days of a concert. Out: the first are named and refused, the last are not."""

import dataclasses
import os
import pathlib

import numpy as np
import pytest

from gpdiff_jax.cities import City, check_city, find_cities, load_city, resample, save_city
from gpdiff_jax.cities.extremes import find_extreme
from gpdiff_jax.errors import InputError


def _counts(regions: int = 4, steps: int = 400) -> np.ndarray:
    levels = np.random.default_rng(0).uniform(1, 80, regions)
    return np.random.default_rng(1).poisson(levels, (steps, regions)).astype(np.float32)


@pytest.mark.parametrize("fill", [2147483647.0, 9.96921e36, 65535.0])
@pytest.mark.parametrize("steps", [slice(30, 31), slice(30, 40), slice(30, 200)])
def test_one_fill_value_and_a_long_outage_of_them_are_found(fill, steps):
    readings = _counts()
    readings[steps, 2] = fill
    usual = np.percentile(_counts()[:, 2], 99)
    found = find_extreme(readings, speed=False)
    assert found is not None and (found.step, found.node, found.others) == (30, 2, steps.stop - 31)
    assert found.value == np.float32(fill) and 0.8 * usual <= found.usual <= 1.2 * usual


def test_a_region_that_is_nearly_always_empty_may_have_its_day():
    readings = _counts()
    readings[:, 0] = 0.0
    readings[100, 0] = 60.0  # sixty times its percentile, within what its city reads
    readings[200:203, 1] = 4.0 * readings[:, 1].max()
    assert find_extreme(readings, speed=False) is None


def test_a_sensor_that_is_filled_nearly_throughout_does_not_hide_the_others():
    readings = _counts(5)
    readings[:240, 0] = 65535.0
    readings[30:35, 1] = 65535.0
    found = find_extreme(readings, speed=False)
    assert found is not None and (found.step, found.node, found.others) == (0, 0, 244)
    # A hub that reads a hundred times what the others do is no sensor of fill values.
    hub = _counts(5)
    hub[:, 0] = 100 * hub[:, 1:].max() + hub[:, 0]
    assert find_extreme(hub, speed=False) is None


def test_places_that_open_abruptly_and_are_closed_most_of_the_time_are_left_alone():
    rng, hour = np.random.default_rng(0), np.arange(24 * 28) % 24
    counts = 25 + rng.poisson(60, (len(hour), 4))
    open_hours = (hour >= 8) & (hour < 18) & (np.arange(len(hour)) // 24 % 7 < 5)
    assert find_extreme(np.where(open_hours[:, None], counts, 0).astype(np.float32), speed=False) is None


def test_speeds_are_judged_more_strictly_than_counts():
    speeds = np.random.default_rng(0).uniform(20, 70, (300, 3)).astype(np.float32)
    speeds[7, 1] = 999.0
    assert find_extreme(speeds, speed=False) is None
    found = find_extreme(speeds, speed=True)
    assert found is not None and (found.step, found.node, found.value) == (7, 1, 999.0)


def test_missing_readings_are_no_extremes():
    readings = _counts()
    readings[:, 1] = np.nan
    readings[5:, 0] = np.nan  # too few to say what is usual there
    assert find_extreme(readings, speed=False) is None
    readings[3, 0] = 1e9
    found = find_extreme(readings, speed=False)
    assert found is not None and (found.step, found.node) == (3, 0)
    assert find_extreme(readings[:11], speed=False) is None


def test_a_city_with_fill_values_is_refused_until_the_user_says_what_is_missing(tmp_path, simulated_cities: list[City]):
    city, path = simulated_cities[0], tmp_path / "town.npz"
    save_city(path, city)
    values = np.array(city.values)
    values[50:53, 3] = 1e9
    with np.load(path) as held:
        np.savez_compressed(path, **{**held, "values": values})
    with pytest.raises(InputError, match=r"1e\+09.*'r3' at step 50 \(2\d{3}-.*2 more like it.*--missing_above"):
        load_city(path)
    with pytest.raises(InputError, match="far beyond the region's usual"):
        check_city(dataclasses.replace(city, values=values))
    for read in (load_city(path, missing_above=1e8), *find_cities(tmp_path, ["town"], missing_above=1e8)):
        assert np.isnan(read.values[50:53, 3]).all()
        read.values[50:53, 3] = city.values[50:53, 3]
        np.testing.assert_array_equal(read.values, city.values)
    # Who says above what readings are missing has said that the others are there.
    events = np.array(city.values)
    events[60, 2] = 60 * np.nanmax(events)
    save_city(path, dataclasses.replace(city, values=events))
    with pytest.raises(InputError, match="what lies below that is then taken as it is"):
        load_city(path)
    read = load_city(path, missing_above=1e8)
    np.testing.assert_array_equal(read.values, events)
    assert check_city(read, judge_extremes=False) is read and resample(read, 120).values[30, 2] > events[60, 2]


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("GPDIFF_DATA"), reason="GPDIFF_DATA names no folder of real cities")
def test_no_reading_of_a_published_city_is_taken_for_a_fill_value():
    paths = sorted(pathlib.Path(os.environ["GPDIFF_DATA"]).glob("*.npz"))
    assert len(paths) >= 10
    for path in paths:
        load_city(path)


@pytest.mark.parametrize("value", [2147483647.0, 65535.0])
def test_a_fill_value_of_a_city_of_three_days_is_found(value):
    # No region has a hundred readings, and none ever will have had them on the day that it matters.
    readings = (
        np.random.default_rng(0).poisson(30 * (1 + np.sin(np.arange(72) / 4))[:, None], (72, 20)).astype(np.float32)
    )
    assert find_extreme(readings, speed=False) is None
    readings[40, 3] = value
    found = find_extreme(readings, speed=False)
    assert found is not None and (found.step, found.node, found.value) == (40, 3, np.float32(value))
    assert find_extreme(readings[:11], speed=False) is None
