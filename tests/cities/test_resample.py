"""In: short series whose bins can be worked out by hand. Out: the sums, means and channels expected of them."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gpdiff_jax.cities import City, partial_bins, resample, select_channels
from gpdiff_jax.cities.recent import RecentReadings
from gpdiff_jax.errors import InputError

_NAN = float("nan")


def _city(values: np.ndarray, *, kind: str = "crowd", interval: int = 15, start: str | None = None) -> City:
    return City(
        name="town",
        kind=kind,
        values=values.astype(np.float32),
        senders=np.array([0], np.int32),
        receivers=np.array([1], np.int32),
        weights=np.ones(1, np.float32),
        interval_minutes=interval,
        start=None if start is None else np.datetime64(start, "m"),
        feature_names=("in flow", "out")[: values.shape[2]],
        node_ids=("a", "b"),
    )


def _two_regions(*first: float) -> np.ndarray:
    return np.stack([np.array(first), np.ones(len(first))], axis=1)[:, :, None]


def test_counts_add_up_and_speeds_average_over_the_observed_readings():
    values = _two_regions(1, 2, _NAN, 3, _NAN, _NAN, _NAN, 8, 7, 7, 7, 9, 1, _NAN, _NAN, 4, 5)
    counts = resample(_city(values), 60)
    speeds = resample(_city(values, kind="speed"), 60)
    # Three of the first bin's four readings add up to 6, hence 8 in a full one; a quarter says too little of the
    # second, half is enough of the last; the seventeenth step belongs to no whole bin.
    np.testing.assert_array_equal(counts.values[:, 0, 0], [8, _NAN, 30, 10])
    np.testing.assert_array_equal(speeds.values[:, 0, 0], [2, _NAN, 7.5, 2.5])
    np.testing.assert_array_equal(counts.values[:, 1, 0], [4, 4, 4, 4])
    assert partial_bins(_city(values), 60) == (1, 2, 8)
    assert partial_bins(_city(values), 15) == (0, 0, 28)
    assert counts.interval_minutes == 60 and counts.values.dtype == np.float32
    assert counts.unit == "in flow per 60 min"


def test_stocks_average_too_and_a_stock_of_none_is_a_reading():
    parked = resample(_city(_two_regions(0, 0, _NAN, 6, 0, 0, 0, 0), kind="stock"), 60)
    np.testing.assert_array_equal(parked.values[:, 0, 0], [2, 0])
    assert parked.unit == "in flow"
    recent = RecentReadings(_city(_two_regions(0, 0, 0, 6), kind="stock", start="2024-05-01T00:00"), 60, 1)
    recent.add([np.datetime64("2024-05-01T01:00", "m")], np.array([[4.0, 0.0]], np.float32))
    recent.add(np.datetime64("2024-05-01T01:15", "m") + 15 * np.arange(3), np.full((3, 2), 8, np.float32))
    np.testing.assert_array_equal(recent.last_days()[-2:], [[1.5, 1], [7, 6]])


@pytest.mark.parametrize(
    ("start", "first", "bins"),
    [("2021-08-04T08:00", "2021-08-04T08:00", 4), ("2021-08-04T08:15", "2021-08-04T09:00", 3)],
)
def test_bins_lie_on_the_local_clock(start, first, bins):
    steps = 16
    city = resample(_city(_two_regions(*range(1, steps + 1)), start=start), 60)
    assert city.start == np.datetime64(first, "m")
    skipped = int((np.datetime64(first, "m") - np.datetime64(start, "m")) / np.timedelta64(15, "m"))
    expected = np.arange(1, steps + 1)[skipped : skipped + 4 * bins].reshape(bins, 4).sum(axis=1)
    np.testing.assert_array_equal(city.values[:, 0, 0], expected)


def test_a_series_before_1970_is_aligned_too():
    city = resample(_city(_two_regions(*range(1, 9)), start="1969-12-31T22:45"), 60)
    assert city.start == np.datetime64("1969-12-31T23:00", "m")
    np.testing.assert_array_equal(city.values[:, 0, 0], [2 + 3 + 4 + 5])


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(np.float32, (13, 2, 2), elements=st.integers(0, 1000).map(float) | st.just(_NAN)),
    st.sampled_from([15, 30, 45, 90]),
    st.booleans(),
)
def test_any_series_agrees_with_a_loop(values, interval, speed):
    values = values + np.float32(1)
    values[:6][np.isnan(values[:6])] = 1
    partly = 0
    factor = interval // 15
    city = resample(_city(values, kind="speed" if speed else "flow"), interval)
    assert city.num_steps == 13 // factor
    for index in np.ndindex(*city.values.shape):
        step, node, channel = index
        seen = [x for x in values[step * factor : (step + 1) * factor, node, channel].tolist() if not np.isnan(x)]
        want = (sum(seen) / len(seen) * (1 if speed else factor)) if 2 * len(seen) >= factor else _NAN
        np.testing.assert_allclose(city.values[index], want, rtol=1e-6)
        partly += 0 < len(seen) < factor
    bins = partial_bins(_city(values, kind="speed" if speed else "flow"), interval)
    assert bins.missing + bins.completed == partly


def test_the_own_interval_changes_nothing():
    city = _city(_two_regions(1, 2, _NAN))
    assert resample(city, 15) is city


def test_two_steps_of_resampling_are_one():
    values = np.random.default_rng(0).poisson(9.0, size=(96, 2, 1))
    city = _city(values, interval=5, start="2024-01-01T00:25")
    twice, once = resample(resample(city, 15), 60), resample(city, 60)
    np.testing.assert_array_equal(twice.values, once.values)
    assert twice.start == once.start


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        (20, r"`interval_minutes` \(=20\) must be a multiple of the 15 minutes of city 'town'; choose e.g. 30"),
        (5, "must be a multiple of the 15 minutes .* choose e.g. 15"),
        (75, "must divide 1440"),
        (0, "at least 1"),
        (1440, "no whole bin"),
    ],
)
def test_an_interval_that_does_not_fit_is_refused(interval, words):
    with pytest.raises(InputError, match=words):
        resample(_city(_two_regions(1, 2, 3, 4)), interval)


def test_a_region_whose_only_reading_is_dropped_is_named():
    values = _two_regions(1, *[_NAN] * 8)
    with pytest.raises(InputError, match="region 'a' has no reading"):
        resample(_city(values, start="2024-01-01T00:45"), 60)


def test_a_region_that_is_never_observed_for_half_a_bin_is_named_with_what_it_shows():
    values = _two_regions(*[1, _NAN, _NAN, _NAN] * 3)
    words = r"region 'a' is never observed for half of 60 minutes \(at most 1 of 4 readings of 'in flow'\); choose"
    with pytest.raises(InputError, match=words):
        resample(_city(values), 60)
    kept = resample(_city(values), 60, keep_silent=True)
    assert np.isnan(kept.values[:, 0, 0]).all() and np.isfinite(kept.values[:, 1]).all()


def test_channels_are_selected_first_each_and_by_name():
    values = np.arange(1, 13).reshape(3, 2, 2)
    city = _city(values)
    (first,) = select_channels(city, "first")
    (named,) = select_channels(city, "out")
    each = select_channels(city, "each")
    assert (first.name, named.name) == ("town", "town")
    assert [part.name for part in each] == ["town:in_flow", "town:out"]
    assert [part.feature_names for part in each] == [("in flow",), ("out",)]
    np.testing.assert_array_equal(first.values, city.values[:, :, :1])
    np.testing.assert_array_equal(named.values, city.values[:, :, 1:])
    np.testing.assert_array_equal(np.concatenate([part.values for part in each], axis=2), city.values)
    with pytest.raises(InputError, match=r"`channels` \(='up'\) .* choose from first, each, in flow, out"):
        select_channels(city, "up")


def test_channels_whose_names_look_alike_stay_apart():
    city = dataclasses.replace(_city(np.ones((3, 2, 2))), feature_names=("a b", "a_b"))
    assert len({part.name for part in select_channels(city, "each")}) == 2
