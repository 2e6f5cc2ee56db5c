"""In: simulated and hand-made cities. Out: baselines that agree with a loop over windows, regions and steps."""

import dataclasses

import numpy as np
import pytest

from gpdiff_jax.baselines.rules import historical_average, last_value
from gpdiff_jax.cities import City
from gpdiff_jax.cities.splits import Span

_WINDOW = {"history": 12, "horizon": 6}


@pytest.fixture(scope="module", name="city")
def _city(simulated_cities: list[City]) -> City:
    """Starts on a Monday, has gaps everywhere, and its region 2 shows nothing in the first five days."""
    city = simulated_cities[0]
    values = np.array(city.values)
    values[np.random.default_rng(0).random(values.shape) < 0.2] = np.nan
    values[:120, 2] = np.nan
    return dataclasses.replace(city, values=values, start=np.datetime64("2024-01-01T00:00", "m"))


def _around_the_clock(sums: dict[int, list[float]], slot: int) -> float:
    back = next(k for k in range(24) if (slot - k) % 24 in sums)
    ahead = next(k for k in range(24) if (slot + k) % 24 in sums)
    last, coming = np.mean(sums[(slot - back) % 24]), np.mean(sums[(slot + ahead) % 24])
    return float(last if back == 0 else (ahead * last + back * coming) / (ahead + back))


def _loop_average(city: City, support: Span, node: int, step: int, *, apart: bool) -> float:
    """The mean of the support at the step's hour, on days of the step's kind if asked."""
    sums: dict[int, list[float]] = {}
    for seen in range(support.start, support.stop):
        same_kind = (seen // 24 % 7 >= 5) == (step // 24 % 7 >= 5)
        if np.isfinite(city.values[seen, node, 0]) and (same_kind or not apart):
            sums.setdefault(seen % 24, []).append(city.values[seen, node, 0])
    return _around_the_clock(sums, step % 24)


@pytest.mark.parametrize(
    ("support", "apart"),
    [
        (Span(120, 264), (True, True)),  # Saturday to Thursday: both kinds were seen
        (Span(168, 240), (False, True)),  # Monday to Wednesday: a weekend is forecast by all days
        (Span(110, 182), (True, True)),
        (Span(109, 130), (False, False)),  # less than a day of either kind
    ],
)
def test_the_historical_average_agrees_with_a_loop(city, support, apart):
    starts = np.array([270, 283, 300, 318])
    forecast = historical_average(city, support, starts, **_WINDOW)
    assert forecast.shape == (4, 8, 6) and forecast.dtype == np.float32
    for s, start in enumerate(starts):
        for node in (0, 1, 5):
            for lead in range(6):
                step = start + 12 + lead
                weekend = step // 24 % 7 >= 5
                enough = apart[0] if weekend else apart[1]
                expected = _loop_average(city, support, node, step, apart=enough)
                np.testing.assert_allclose(forecast[s, node, lead], expected, rtol=1e-4)


def test_the_last_value_agrees_with_a_loop(city):
    support, starts = Span(168, 240), np.arange(240, 318)
    values = np.array(city.values)
    values[250:266, 4] = np.nan  # a whole history without a reading
    city = dataclasses.replace(city, values=values)
    forecast = last_value(city, support, starts, **_WINDOW)
    assert forecast.shape == (78, 8, 6) and forecast.dtype == np.float32
    fallbacks = 0
    for s, start in enumerate(starts):
        for node in range(8):
            seen = [r for r in values[start : start + 12, node, 0] if np.isfinite(r)]
            fallbacks += not seen
            expected = seen[-1] if seen else np.nanmean(values[168:240, node, 0])
            np.testing.assert_allclose(forecast[s, node], np.full(6, expected), rtol=1e-5)
    assert fallbacks >= 4


def test_a_silent_region_is_forecast_by_its_neighbours(city):
    support, starts = Span(24, 96), np.array([100, 200])
    average = historical_average(city, support, starts, **_WINDOW)
    linked = [k for k in range(8) if (city.adjacency() + city.adjacency().T)[2, k] > 0]
    assert linked and 2 not in linked
    np.testing.assert_allclose(average[:, 2], average[:, linked].mean(axis=1), rtol=1e-5)
    latest = last_value(city, support, np.array([100]), **_WINDOW)
    means = [np.nanmean(city.values[24:96, k, 0]) for k in linked]
    np.testing.assert_allclose(latest[0, 2], np.full(6, np.mean(means)), rtol=1e-5)


def test_without_a_calendar_all_days_count_alike(city):
    unknown = dataclasses.replace(city, start=None)
    support, starts = Span(120, 264), np.array([270, 300])
    forecast = historical_average(unknown, support, starts, **_WINDOW)
    for s, start in enumerate(starts):
        expected = [_loop_average(unknown, support, 3, start + 12 + lead, apart=False) for lead in range(6)]
        np.testing.assert_allclose(forecast[s, 3], expected, rtol=1e-4)
