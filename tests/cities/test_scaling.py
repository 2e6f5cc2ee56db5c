"""In: short series and graphs whose statistics can be worked out by hand. Out: those statistics."""

import numpy as np
import pytest

from gpdiff_jax.cities import City
from gpdiff_jax.cities.scaling import fill_from_neighbours, hardly_read, region_scales, silent_regions
from gpdiff_jax.cities.splits import Span
from gpdiff_jax.errors import InputError

_NAN = float("nan")


def _city(columns: list[list[float]], edges: list[tuple[int, int]]) -> City:
    values = np.array(columns, np.float32).T[:, :, None]
    return City(
        name="town",
        kind="crowd",
        values=values,
        senders=np.array([s for s, _ in edges], np.int32),
        receivers=np.array([r for _, r in edges], np.int32),
        weights=np.full(len(edges), 0.5, np.float32),
        interval_minutes=60,
        start=None,
        feature_names=("visitors",),
        node_ids=tuple(f"r{k}" for k in range(values.shape[1])),
    )


def test_mean_and_deviation_are_those_of_the_observed_readings_of_the_visible_span():
    city = _city([[999, 1, 3, _NAN, 5, 999], [999, 10, 10, 40, 40, 999], [999, 2, 6, 2, 6, 999]], [(0, 1), (1, 2)])
    mean, std = region_scales(city, Span(1, 5))
    np.testing.assert_allclose(mean, [3, 25, 4])
    np.testing.assert_allclose(std, [np.sqrt(8 / 3), 15, 2], rtol=1e-6)
    assert mean.dtype == std.dtype == np.float32


def test_a_region_that_hardly_moves_takes_a_twentieth_of_the_median_deviation():
    city = _city([[7, 7, 7, 7], [0, 8, 0, 8], [0, 20, 0, 20]], [(0, 1), (1, 2)])
    _, std = region_scales(city, Span(0, 4))
    np.testing.assert_allclose(std, [0.05 * 4, 4, 10])
    # Where nothing moves at all, a division by it is still finite.
    _, still = region_scales(_city([[7, 7], [7, 7]], [(0, 1)]), Span(0, 2))
    np.testing.assert_allclose(still, 1e-3)


def test_a_region_that_was_hardly_read_takes_its_neighbours_day_at_its_own_level():
    # The third has five readings, fewer than those of a quarter of a day. At even hours the others read 5/8 of their
    # means, at odd ones 11/8: five hours hold 37/8 usual readings of the second region, its neighbour, which are 18.5.
    day, few = [[1.0, 3.0] * 12, [3.0, 5.0] * 12], [80.0, 80.0, 80.0, 80.0, 80.0]
    city = _city([*day, few + [_NAN] * 19], [(0, 1), (1, 2)])
    mean, std = region_scales(city, Span(0, 24))
    level = (400 + 0.25 * 4) / (18.5 + 0.25 * 4)
    np.testing.assert_allclose(mean, [2, 4, 4 * level], rtol=1e-6)
    np.testing.assert_allclose(std, [1, 1, level], rtol=1e-6)
    np.testing.assert_array_equal(hardly_read(city, Span(0, 24)), [False, False, True])
    # With one reading more it is known not to move.
    city = _city([*day, [80.0, *few] + [_NAN] * 18], [(0, 1), (1, 2)])
    np.testing.assert_allclose(region_scales(city, Span(0, 24))[1], [1, 1, 0.05])
    # A zero read when others read most is little more than nothing, and no reading is what the neighbours read.
    city = _city([*day, [_NAN, 0.0] + [_NAN] * 22, [_NAN] * 24], [(0, 1), (1, 2), (3, 1)])
    np.testing.assert_allclose(region_scales(city, Span(0, 24))[0], [2, 4, 4 * 1 / (5.5 + 1), 4], rtol=1e-6)
    # Where all were hardly read, their own readings are all there is.
    city = _city([[5.0, 7.0, *few[2:]], few], [(0, 1)])
    np.testing.assert_array_equal(hardly_read(city, Span(0, 2)), [False, False])
    np.testing.assert_allclose(region_scales(city, Span(0, 2))[0], [6, 80])


def test_silent_regions_are_those_without_a_reading_in_the_span():
    city = _city([[1, _NAN, _NAN], [1, _NAN, 3], [_NAN, 2, _NAN]], [(0, 1), (1, 2)])
    np.testing.assert_array_equal(silent_regions(city, Span(1, 3)), [True, False, False])
    np.testing.assert_array_equal(silent_regions(city, Span(0, 1)), [False, False, True])


def test_silent_regions_take_their_neighbours_mean_hop_by_hop():
    # 0 and 1 are known; 2 hears both (edges of either direction), 3 hears only 2, 4 hears 1 and 3: 1 is nearer.
    city = _city([[1.0]] * 6, [(0, 2), (2, 1), (3, 2), (4, 1), (3, 4)])
    rows = np.array([[1, 10], [5, 30], [-9, -9], [-9, -9], [-9, -9], [-9, -9]], np.float64)
    silent = np.array([False, False, True, True, True, False])
    rows[5] = [6, 50]
    filled = fill_from_neighbours(rows, silent, city)
    np.testing.assert_allclose(filled, [[1, 10], [5, 30], [3, 20], [4, 25], [5, 30], [6, 50]])
    np.testing.assert_array_equal(rows[2], [-9, -9])


def test_what_no_path_joins_to_a_known_region_takes_the_mean_of_the_city():
    city = _city([[1.0]] * 4, [(0, 1), (2, 3)])
    rows = np.array([[1.0], [5.0], [_NAN], [_NAN]])
    filled = fill_from_neighbours(rows, np.array([False, False, True, True]), city)
    np.testing.assert_allclose(filled, [[1], [5], [3], [3]])


def test_a_silent_region_is_scaled_like_its_neighbours():
    city = _city([[0, 2, 0, 2], [_NAN] * 4, [0, 6, 0, 6]], [(0, 1), (2, 1)])
    mean, std = region_scales(city, Span(0, 4))
    np.testing.assert_allclose(mean, [1, 2, 3])
    np.testing.assert_allclose(std, [1, 2, 3])


def test_a_span_without_any_reading_is_refused():
    city = _city([[1, _NAN, _NAN], [1, _NAN, _NAN]], [(0, 1)])
    with pytest.raises(InputError, match=r"city 'town' has no reading in its visible span \(steps 1 to 3\)"):
        region_scales(city, Span(1, 3))
