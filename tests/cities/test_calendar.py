"""In: cities that begin at all kinds of times. Out: what the standard library's calendar says of their steps."""

import datetime
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpdiff_jax.cities import City
from gpdiff_jax.cities.calendar import NUM_CALENDAR, calendar_features, is_weekend, minutes_of_week, slot_of_day


def _city(start: str | None, *, interval: int = 60, steps: int = 200) -> City:
    return City(
        name="town",
        kind="crowd",
        values=np.ones((steps, 2, 1), np.float32),
        senders=np.array([0], np.int32),
        receivers=np.array([1], np.int32),
        weights=np.ones(1, np.float32),
        interval_minutes=interval,
        start=None if start is None else np.datetime64(start, "m"),
        feature_names=("visitors",),
        node_ids=("a", "b"),
    )


@given(
    st.datetimes(datetime.datetime(1902, 1, 1), datetime.datetime(2100, 1, 1)), st.sampled_from([5, 15, 60, 360, 1440])
)
def test_every_step_agrees_with_datetime(start, interval):
    minute = (start.hour * 60 + start.minute) // interval * interval
    start = start.replace(hour=minute // 60, minute=minute % 60, second=0, microsecond=0)
    city = _city(start.isoformat(), interval=interval, steps=50)
    features, weekend = calendar_features(city), is_weekend(city)
    assert features.shape == (50, NUM_CALENDAR) and features.dtype == np.float32 and weekend is not None
    for step in range(50):
        now = start + datetime.timedelta(minutes=step * interval)
        of_day = now.hour * 60 + now.minute
        of_week = now.weekday() * 1440 + of_day
        assert minutes_of_week(city)[step] == of_week
        assert slot_of_day(city)[step] == of_day // interval
        assert weekend[step] == (now.weekday() >= 5)
        expected = [wave(2 * math.pi * k * of_day / 1440) for k in range(1, 9) for wave in (math.sin, math.cos)] + [
            now.weekday() == 5,
            now.weekday() == 6,
        ]
        expected += [math.sin(2 * math.pi * of_week / 10080), math.cos(2 * math.pi * of_week / 10080)]
        np.testing.assert_allclose(features[step], expected, atol=1e-5)


def test_an_unknown_start_is_midnight_of_no_day():
    city, known = _city(None), _city("2024-01-01T00:00")
    assert is_weekend(city) is None
    np.testing.assert_array_equal(slot_of_day(city), np.arange(200) % 24)
    features = calendar_features(city)
    np.testing.assert_array_equal(features[:, -4:], 0)
    np.testing.assert_array_equal(features[:, :-4], calendar_features(known)[:, :-4])


@pytest.mark.parametrize("start", ["2024-02-28T22:00", "1969-12-30T05:00"])
def test_time_is_continuous_over_leap_days_and_the_epoch(start):
    minutes = minutes_of_week(_city(start))
    np.testing.assert_array_equal(np.diff(minutes) % 10080, 60)
