"""In: a zoo of known differences. Out: its directions, as long as regions differ along them."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from gpdiff_jax.errors import InputError
from gpdiff_jax.zoo import directions
from gpdiff_jax.zoo.directions import zoo_directions
from gpdiff_jax.zoo.parameter_zoo import HeldVectors, ParameterZoo
from tests.zoo.linear import prepare, start_of


@pytest.fixture(scope="module", name="zoo")
def _zoo(simulated_cities) -> ParameterZoo:
    """Two regions of one city and six of another, which differ along two known directions, the first by far more."""
    sources = prepare(simulated_cities[:2])
    pooled = jax.tree.map(np.asarray, start_of(sources))
    rng = np.random.default_rng(0)
    first, second = ({"bias": rng.normal(size=6), "kernel": rng.normal(size=(6, 44))} for _ in range(2))
    amounts = rng.normal(size=(8, 2)) * [3.0, 0.5] + [1.0, 0.0]

    def vectors(leaf, one, other):
        moved = leaf + np.tensordot(amounts, np.stack([one, other]), axes=1)
        # The second vector of a region is not looked at.
        return np.stack([moved, 100.0 + moved], axis=1).astype(np.float32)

    own = HeldVectors(jax.tree.map(vectors, pooled, first, second))
    city = np.array([0, 0, 1, 1, 1, 1, 1, 1])
    fields: dict[str, Any] = {name: np.zeros((8, 2), int) for name in ("step", "seed", "data_window")}
    fields |= {"validation_mae": np.zeros((8, 2)), "start_mae": np.zeros(8), "prompts": sources.prompts}
    fields |= {"names": tuple("abcdefgh"), "city_index": city}
    return ParameterZoo("linear", pooled, own, **fields)


def _rows(tree) -> np.ndarray:
    return np.concatenate([np.asarray(leaf).reshape(len(leaf), -1) for leaf in jax.tree.leaves(tree)], axis=1)


def test_directions_are_principal_axes_as_long_as_their_spread_and_not_centred(zoo):
    found = _rows(zoo_directions(zoo, 3)).astype(np.float64)
    best = jax.tree.map(lambda leaf, pooled: leaf[:, 0] - pooled, zoo.params, zoo.pooled)
    rows = _rows(best).astype(np.float64)
    weights = np.array([1 / 4] * 2 + [1 / 12] * 6)  # every city the same total
    power, axes = np.linalg.eigh((rows * weights[:, None]).T @ rows)
    for k in range(2):
        np.testing.assert_allclose(np.linalg.norm(found[k]), np.sqrt(power[-1 - k]), rtol=1e-4)
        np.testing.assert_allclose(abs(found[k] @ axes[:, -1 - k]), np.sqrt(power[-1 - k]), rtol=1e-4)
        # A usual coordinate is 1.
        coordinates = rows @ found[k] / (found[k] @ found[k])
        np.testing.assert_allclose((weights * coordinates**2).sum(), 1.0, rtol=1e-4)
        assert found[k][np.abs(found[k]).argmax()] > 0
    # Regions differ along two directions, no more.
    assert np.linalg.norm(found[2]) < 1e-3


def test_there_are_no_more_directions_than_regions_and_at_least_one(zoo):
    assert _rows(zoo_directions(zoo, 64)).shape[0] == 8
    one = zoo_directions(zoo, 1)
    assert {leaf.dtype for leaf in jax.tree.leaves(one)} == {np.dtype("float32")}
    assert jax.tree.structure(one) == jax.tree.structure(zoo.pooled)
    with pytest.raises(InputError, match=r"`count` must be at least 1, got 0"):
        zoo_directions(zoo, 0)
    swapped = dataclasses.replace(zoo, city_index=zoo.city_index[::-1])
    assert np.abs(_rows(zoo_directions(swapped, 1)) - _rows(one)).max() > 1e-3


def test_of_a_large_zoo_as_many_regions_of_every_city_are_looked_at_as_it_has(zoo, monkeypatch):
    assert directions._chosen(zoo.city_index, 8).tolist() == list(range(8))
    assert zoo.city_index.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    assert directions._chosen(zoo.city_index, 5).tolist() == [0, 1, 2, 4, 7]
    assert directions._chosen(zoo.city_index, 1).tolist() == [0, 2]
    whole = zoo_directions(zoo, 2)
    monkeypatch.setattr(directions, "_MOST_REGIONS", 5)
    few = zoo_directions(zoo, 2)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(few), strict=True):
        cosine = (one * other).reshape(2, -1).sum(1) / np.sqrt(
            np.square(one).reshape(2, -1).sum(1) * np.square(other).reshape(2, -1).sum(1)
        )
        assert (np.abs(cosine) > 0.9).all()  # the same two, of other lengths
    assert few["bias"].shape == (2, 6)
    # A part of the vectors in which no region is chosen.
    parts = [(np.array([row]), jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], zoo.params)) for row in range(8)]
    monkeypatch.setattr(HeldVectors, "parts", lambda own: iter(parts))
    jax.tree.map(np.testing.assert_array_equal, zoo_directions(zoo, 2), few)
