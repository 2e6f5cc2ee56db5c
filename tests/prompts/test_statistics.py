"""In: short series and small graphs. Out: statistics that agree with loops, or that can be worked out by hand."""

import dataclasses
import math

import numpy as np
import pytest

from gpdiff_jax.cities import City
from gpdiff_jax.cities.expectation import ALONE
from gpdiff_jax.cities.splits import Span
from gpdiff_jax.prompts.statistics import spatial_statistics, temporal_statistics
from tests.tiny import town


def _column(table: np.ndarray, names: tuple[str, ...], name: str) -> np.ndarray:
    return table[:, names.index(name)]


def test_spatial_statistics_of_a_kite_by_hand():
    # A triangle 0-1-2 with a tail 2-3-4; edges of one direction count for both.
    city = town([(0, 1, 0.5), (1, 2, 1.0), (2, 0, 0.2), (2, 3, 0.4), (4, 3, 0.1)], 5)
    table, names = spatial_statistics(city)
    assert table.shape == (5, len(names)) and table.dtype == np.float32
    degree = np.log1p([2, 2, 3, 2, 1])
    np.testing.assert_allclose(_column(table, names, "log_degree"), degree - degree.mean(), rtol=1e-5)
    strength = np.log1p([0.7, 1.5, 1.6, 0.5, 0.1])
    np.testing.assert_allclose(_column(table, names, "log_strength"), strength - strength.mean(), rtol=1e-5)
    np.testing.assert_allclose(_column(table, names, "clustering"), [1, 1, 1 / 3, 0, 0], rtol=1e-5)
    hops = np.log(
        np.array([0 + 1 + 1 + 2 + 3, 1 + 0 + 1 + 2 + 3, 1 + 1 + 0 + 1 + 2, 2 + 2 + 1 + 0 + 1, 3 + 3 + 2 + 1]) / 5
    )
    np.testing.assert_allclose(_column(table, names, "log_mean_hops"), hops - hops.mean(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(_column(table, names, "share_within_two_hops"), [0.75, 0.75, 1, 1, 0.5], rtol=1e-6)
    np.testing.assert_array_equal(_column(table, names, "log_spacing"), 0)


def test_regions_that_no_path_joins_are_as_far_as_the_city_is_large():
    table, names = spatial_statistics(town([(0, 1, 1.0), (2, 3, 1.0)], 4))
    np.testing.assert_allclose(_column(table, names, "share_within_two_hops"), 1 / 3, rtol=1e-6)
    assert np.isfinite(table).all()


def test_spacing_is_the_distance_to_the_fifth_nearest_region():
    latitude = np.array([0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.10])
    city = town([(k, k + 1, 1.0) for k in range(6)], 7, latitude=latitude, longitude=np.zeros(7))
    table, names = spatial_statistics(city)
    fifth = 111.2 * np.array([0.05, 0.04, 0.03, 0.03, 0.04, 0.05, 0.09])
    np.testing.assert_allclose(_column(table, names, "log_spacing"), np.log(fifth / np.median(fifth)), atol=2e-3)


@pytest.fixture(scope="module", name="city")
def _city(simulated_cities: list[City]) -> City:
    city = simulated_cities[0]
    values = np.array(city.values)
    values[np.random.default_rng(0).random(values.shape) < 0.15] = np.nan
    return dataclasses.replace(city, values=values)


def _loop_correlation(x: list[float], y: list[float], lag: int) -> float:
    pairs = [(x[t], y[t - lag]) for t in range(lag, len(x)) if math.isfinite(x[t]) and math.isfinite(y[t - lag])]
    if len(pairs) < 4:
        return 0.0
    return float(np.corrcoef(np.array(pairs).T)[0, 1])


def test_temporal_statistics_agree_with_a_loop(city):
    span = Span(30, 126)
    table, names = temporal_statistics(city, span)
    assert table.shape == (8, len(names)) and len(set(names)) == len(names) and np.isfinite(table).all()
    readings = city.values[span.start : span.stop, :, 0].astype(np.float64)
    mean, std = np.nanmean(readings, axis=0), np.nanstd(readings, axis=0)
    scaled = (readings - mean) / std
    assert city.start is not None
    first_hour = int((city.start - city.start.astype("datetime64[D]")) / np.timedelta64(60, "m"))
    hour = (first_hour + np.arange(span.start, span.stop)) % 24
    day = np.stack([np.nanmean(scaled[hour == h], axis=0) for h in range(24)])
    weekend = (city.start + np.arange(span.start, span.stop) * np.timedelta64(60, "m")).astype("datetime64[D]")
    weekend = (weekend.view("int64") - 2) % 7 < 2
    deviation = np.full_like(scaled, np.nan)
    for node in range(8):
        for t in range(len(scaled)):
            alike = scaled[(hour == hour[t]) & (weekend == weekend[t]), node]
            alike = alike[np.isfinite(alike)]
            if len(alike) > 1:
                deviation[t, node] = (scaled[t, node] - alike.mean()) * math.sqrt(len(alike) / (len(alike) - 1))
    weights = np.maximum(city.adjacency(), city.adjacency().T)
    for node in range(8):
        got = dict(zip(names, table[node], strict=True))
        for h in range(24):
            assert got[f"profile_{h:02d}h"] == pytest.approx(day[h, node], abs=1e-4)
        for lag in (1, 2, 3, 6, 12, 24):
            expected = _loop_correlation(scaled[:, node].tolist(), scaled[:, node].tolist(), lag)
            assert got[f"autocorrelation_{lag}h"] == pytest.approx(expected, abs=1e-4)
        around = []
        for row in deviation:
            near = [(weights[node, k], row[k]) for k in range(8) if weights[node, k] > 0 and math.isfinite(row[k])]
            around.append(sum(w * r for w, r in near) / sum(w for w, _ in near) if near else math.nan)
        own = deviation[:, node].tolist()
        everyone = np.nanmean(deviation, axis=1).tolist()
        expected = {
            "deviation_autocorrelation_step": _loop_correlation(own, own, 1),
            "deviation_autocorrelation_1h": _loop_correlation(own, own, 1),
            "deviation_share": math.sqrt(np.nanmean(np.square(own))),
            "deviation_with_neighbours": _loop_correlation(own, around, 0),
            "deviation_after_neighbours": _loop_correlation(own, around, 1),
            "deviation_with_city": _loop_correlation(own, everyone, 0),
            "skewness": np.nanmean(scaled[:, node] ** 3),
            "log_level": math.log1p(mean[node]),
            "log_days": math.log(4.0),
            "missing_share": np.isnan(readings[:, node]).mean(),
            "zero_share": (readings[:, node] == 0).sum() / np.isfinite(readings[:, node]).sum(),
        }
        for name, value in expected.items():
            assert got[name] == pytest.approx(value, abs=2e-4), (name, node)


def test_the_size_of_deviations_is_estimated_alike_from_two_days_and_from_many():
    # Independent noise of deviation 1 around a daily pattern of deviation 3, 400 regions.
    random = np.random.default_rng(0)
    pattern = 3 * np.sqrt(2) * np.sin(np.arange(24) / 24 * 2 * np.pi)
    values = (np.tile(pattern, 5)[:, None] + random.normal(size=(120, 400))).astype(np.float32)[:, :, None]
    city = dataclasses.replace(town([(0, 1, 1.0)], 400), values=values, start=np.datetime64("2024-04-01T00:00", "m"))
    tables = {days: temporal_statistics(city, Span(0, 24 * days)) for days in (1, 2, 3, 5)}
    # In deviations of the region, which hold the pattern too.
    for days in (2, 3, 5):
        share = _column(*tables[days], "deviation_share")
        assert share.mean() == pytest.approx(1 / math.sqrt(10), rel=0.02), days
        assert _column(*tables[days], "log_days") == pytest.approx(math.log(days))
    np.testing.assert_allclose(_column(*tables[1], "deviation_share"), ALONE)
    np.testing.assert_array_equal(_column(*tables[1], "deviation_autocorrelation_1h"), 0)


def test_units_do_not_show_in_what_compares_cities(city):
    span = Span(30, 126)
    table, names = temporal_statistics(city, span)
    scaled, _ = temporal_statistics(dataclasses.replace(city, values=city.values * np.float32(100)), span)
    free = [k for k, name in enumerate(names) if name not in ("log_level", "log_variation")]
    np.testing.assert_allclose(scaled[:, free], table[:, free], atol=1e-3)


def test_a_silent_region_takes_its_neighbours_statistics(city):
    span, values = Span(30, 126), np.array(city.values)
    values[span.start : span.stop, 2] = np.nan
    table, names = temporal_statistics(dataclasses.replace(city, values=values), span)
    linked = [k for k in range(8) if (city.adjacency() + city.adjacency().T)[2, k] > 0]
    np.testing.assert_allclose(table[2], table[linked].mean(axis=0), rtol=1e-4, atol=1e-5)
    assert len(names) == table.shape[1]


def test_an_unknown_calendar_takes_the_usual_share_of_weekends(city):
    span = Span(30, 126)
    table, names = temporal_statistics(dataclasses.replace(city, start=None), span)
    np.testing.assert_allclose(_column(table, names, "weekend_share"), 2 / 7, rtol=1e-6)
