"""In: distances on a line and on a plane, and weights and trips. Out: only the first are taken for distances."""

import numpy as np
import pytest

from gpdiff_jax.cities.city import City, check_city, edges_of
from gpdiff_jax.cities.distances import is_distance_matrix
from gpdiff_jax.errors import InputError


def _apart(count: int, seed: int = 0) -> np.ndarray:
    places = np.random.default_rng(seed).uniform(0, 9000, (count, 2))
    return np.hypot(*(places[:, None] - places[None]).transpose(2, 0, 1)).astype(np.float32)


@pytest.mark.parametrize("count", [4, 20, 300])
def test_distances_are_told_from_weights_and_trips(count):
    metres = _apart(count)
    line = 500 * np.abs(np.subtract.outer(np.arange(count), np.arange(count))).astype(np.float32)
    assert is_distance_matrix(metres) and is_distance_matrix(line) and is_distance_matrix(metres / metres.max())
    trips = np.random.default_rng(1).gamma(0.3, 100.0, (count, count)).astype(np.float32)
    weights = np.exp(-np.square(metres / metres.std())).astype(np.float32)
    sparse = np.where(metres < np.median(metres), metres, 0)
    equal = np.ones((count, count), np.float32)
    if count > 4:  # of three others, nothing can be said
        assert not is_distance_matrix(trips) and not is_distance_matrix(weights)
    for other in (sparse, equal):
        np.fill_diagonal(other, 0)
        assert not is_distance_matrix(other)
    assert not is_distance_matrix(metres[:3, :3])


@pytest.mark.parametrize(("distances", "words"), [(True, "look like distances"), (False, "larger for nearer regions")])
def test_the_advice_never_makes_neighbours_of_the_farthest(distances, words):
    matrix = _apart(12) if distances else np.random.default_rng(1).gamma(0.3, 100.0, (12, 12)).astype(np.float32)
    np.fill_diagonal(matrix, 0)
    names = tuple(f"r{k}" for k in range(12))
    values = np.ones((24, 12, 1), np.float32)
    city = City("line", "crowd", values, *edges_of(matrix), 60, None, ("visits",), names)
    with pytest.raises(InputError, match=words) as raised:
        check_city(city)
    assert "is above 1; " in str(raised.value) and "exp(-(d / s)^2)" in str(raised.value)
