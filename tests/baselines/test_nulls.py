"""In: zoos whose parameters are a known function of the prompt. Out: every rule agrees with a loop over regions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.baselines import nulls, ridge
from gpdiff_jax.baselines.nulls import (
    gaussian_codes,
    kernel_average,
    nearest_plus_noise,
    nearest_prompt,
    ridge_hypernetwork,
    ridge_plus_noise,
    zoo_mean,
)
from gpdiff_jax.data.sources import city_weights
from gpdiff_jax.errors import InputError
from gpdiff_jax.prompts.prompt import Prompts, fit_prompt_scaler, scale_of, scale_prompts
from gpdiff_jax.zoo.parameter_zoo import HeldVectors, ParameterZoo

_ENTRIES, _OUT = 3, 5


def _problem(cities: int, *, noise: float = 0.0, regions: int = 200):
    """Three variants of a prompt, all but equal; parameters linear in it; and a target city."""
    rng = np.random.default_rng(0)
    described = rng.normal(size=(regions + 20, _ENTRIES))
    slope, shift = rng.normal(size=(_ENTRIES, _OUT)), rng.normal(size=_OUT)
    params = described @ slope + shift + noise * rng.normal(size=(regions + 20, _OUT))
    pooled = {"a": {"x": np.full(2, 0.5, np.float32)}, "b": np.full((3, 1), -1.0, np.float32)}

    def tree(rows: np.ndarray) -> dict:
        rows = rows.astype(np.float32)
        return {"a": {"x": rows[:, :2]}, "b": rows[:, 2:, None]}

    snapshots = jax.tree.map(lambda leaf: np.stack([leaf, leaf + 9], axis=1), tree(params[:regions]))
    variants = described[None, :regions] + 1e-3 * rng.normal(size=(3, regions, _ENTRIES))
    names = tuple(f"p{k}" for k in range(_ENTRIES))
    zoo = ParameterZoo(
        model="linear",
        pooled=pooled,
        vectors=HeldVectors(snapshots),
        validation_mae=np.ones((regions, 2), np.float32),
        start_mae=np.ones(regions, np.float32),
        step=np.ones((regions, 2), np.int32),
        seed=np.zeros((regions, 2), np.int32),
        data_window=np.zeros((regions, 2), np.int32),
        prompts=Prompts(jnp.asarray(variants, jnp.float32), jnp.arange(regions, dtype=jnp.uint32), names),
        names=tuple(f"city/{k}" for k in range(regions)),
        city_index=(np.arange(regions) % cities).astype(np.int32),
    )
    target = Prompts(jnp.asarray(described[None, regions:], jnp.float32), jnp.arange(20, dtype=jnp.uint32), names)
    return zoo, target, tree(params[regions:])


@pytest.mark.parametrize("cities", [1, 2])
def test_a_linear_zoo_is_found_with_the_smallest_penalty(cities):
    zoo, target, true = _problem(cities)
    params, penalty = ridge_hypernetwork(zoo, target)
    assert penalty == 0.03
    assert jax.tree.structure(params) == jax.tree.structure(true)
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(true), strict=True):
        assert got.shape == want.shape and got.dtype == jnp.float32
        # A penalty of 0.03 on unit-size entries shrinks slopes by three per cent.
        np.testing.assert_allclose(got, want, atol=0.25)
        assert np.corrcoef(np.asarray(got).ravel(), want.ravel())[0, 1] > 0.999


def test_the_solution_is_the_weighted_ridge_regression():
    zoo, target, _ = _problem(2, noise=0.5)
    params, penalty = ridge_hypernetwork(zoo, target)
    scaler = fit_prompt_scaler(zoo.prompts, zoo.city_index)
    described = np.asarray(scale_prompts(zoo.prompts, scaler), np.float64).reshape(-1, _ENTRIES)
    wanted = np.tile(np.concatenate([zoo.params["a"]["x"][:, 0], zoo.params["b"][:, 0, :, 0]], axis=1), (3, 1))
    root = np.sqrt(np.full(len(described), 1 / len(described)))[:, None]
    rows = np.concatenate(
        [
            root * np.append(described, np.ones((len(described), 1)), axis=1),
            np.sqrt(penalty) * np.eye(_ENTRIES, _ENTRIES + 1),
        ]
    )
    pooled = np.array([0.5, 0.5, -1, -1, -1])
    solution = np.linalg.lstsq(
        rows, np.concatenate([root * (wanted - pooled), np.zeros((_ENTRIES, _OUT))]), rcond=None
    )[0]
    queries = np.asarray(scale_prompts(target, scaler), np.float64)[0]
    expected = pooled + np.append(queries, np.ones((20, 1)), axis=1) @ solution
    np.testing.assert_allclose(np.asarray(params["a"]["x"]), expected[:, :2], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.asarray(params["b"])[:, :, 0], expected[:, 2:], rtol=1e-4, atol=1e-4)


def test_prompts_that_say_nothing_are_penalised_most():
    zoo, target, _ = _problem(2, regions=12)
    rng = np.random.default_rng(1)
    noise = jnp.asarray(rng.normal(size=(3, 12, 3)), jnp.float32)
    deaf = dataclasses.replace(zoo, prompts=dataclasses.replace(zoo.prompts, values=noise))
    _, penalty = ridge_hypernetwork(deaf, target)
    assert penalty >= 1.0


def _uneven(cities: int = 3, regions: int = 13) -> tuple:
    """Cities of different sizes: their weights matter."""
    zoo, target, _ = _problem(1, noise=0.7, regions=regions)
    rng = np.random.default_rng(3)
    described = np.asarray(zoo.prompts.values)
    variants = jnp.asarray(described + 0.4 * rng.normal(size=described.shape), jnp.float32)
    city = np.sort(rng.permutation(np.r_[np.arange(cities), rng.integers(0, cities, regions - cities)]))
    assert len(set(np.bincount(city))) > 1
    prompts = dataclasses.replace(zoo.prompts, values=variants)
    return dataclasses.replace(zoo, prompts=prompts, city_index=city.astype(np.int32)), target


def _rows(params: dict) -> np.ndarray:
    """Parameters [..., 5] of every region, in the order of the pytree."""
    a, b = np.asarray(params["a"]["x"], np.float64), np.asarray(params["b"], np.float64)
    return np.concatenate([a, b[..., 0]], axis=-1)


def _scaled(zoo: ParameterZoo, target: Prompts) -> tuple[np.ndarray, np.ndarray]:
    scaler = fit_prompt_scaler(zoo.prompts, zoo.city_index)
    known, queries = scale_prompts(zoo.prompts, scaler), scale_prompts(target, scaler)
    return np.asarray(known, np.float64), np.asarray(queries, np.float64)[0]


def _scaled_without(zoo: ParameterZoo, region: int) -> np.ndarray:
    """All prompts in a scale that the region's city has no part in."""
    rows = zoo.city_index != zoo.city_index[region]
    values = np.asarray(zoo.prompts.values)
    tables = [values[:, rows][:, zoo.city_index[rows] == city] for city in np.unique(zoo.city_index[rows])]
    mean = np.mean([table.mean(axis=(0, 1)) for table in tables], axis=0)
    variance = np.mean([np.square(table - mean).mean(axis=(0, 1)) for table in tables], axis=0)
    return np.clip((values - mean) / (np.sqrt(variance) + 1e-3), -4, 4).astype(np.float64)


def _shortest(query: np.ndarray, described: np.ndarray, region: int | np.integer) -> float:
    return min(float(np.sqrt(((query - described[v, region]) ** 2).sum())) for v in range(len(described)))


def test_the_mean_of_the_zoo_is_the_mean_of_the_means_of_its_cities():
    zoo, target = _uneven()
    best = _rows(zoo.params)[:, 0]
    expected = np.mean([best[zoo.city_index == city].mean(axis=0) for city in range(3)], axis=0)
    np.testing.assert_allclose(_rows(zoo_mean(zoo, target)), np.tile(expected, (20, 1)), rtol=1e-5)
    assert np.abs(expected - best.mean(axis=0)).max() > 0.01


def test_the_nearest_prompts_parameters_are_those_of_one_region():
    zoo, target = _uneven()
    described, queries = _scaled(zoo, target)
    got = nearest_prompt(zoo, target)
    chosen = [min(range(13), key=lambda region: _shortest(query, described, region)) for query in queries]
    assert len(set(chosen)) > 3
    # Through the difference from the pooled model and back: one rounding.
    np.testing.assert_allclose(_rows(got), _rows(zoo.params)[chosen, 0], rtol=1e-6, atol=1e-6)
    # A prompt of the zoo, in any variant, finds its own region.
    own = dataclasses.replace(target, values=zoo.prompts.values[2:], region_ids=zoo.prompts.region_ids)
    found = _rows(nearest_prompt(zoo, own))
    np.testing.assert_allclose(found, _rows(zoo.params)[:, 0], rtol=1e-6, atol=1e-6)


def _kernel_loop(query, described, best, weights, rows, bandwidth) -> np.ndarray:
    total, mass = np.zeros(best.shape[1]), 0.0
    for region in rows:
        for variant in range(len(described)):
            distance = np.sqrt(((query - described[variant, region]) ** 2).sum())
            share = weights[region] * np.exp(-0.5 * (distance / bandwidth) ** 2)
            total, mass = total + share * best[region], mass + share
    return total / mass


def test_the_kernel_average_and_its_bandwidth_are_those_of_a_loop_that_leaves_cities_out():
    zoo, target = _uneven()
    described, queries = _scaled(zoo, target)
    best, city = _rows(zoo.params)[:, 0], zoo.city_index
    weights = 1 / np.bincount(city)[city]
    others = [np.flatnonzero(city != city[region]) for region in range(13)]
    apart = [_scaled_without(zoo, r) for r in range(13)]
    usual = np.median([min(_shortest(apart[r][0, r], apart[r], k) for k in others[r]) for r in range(13)])
    errors = {}
    for factor in (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 4.0, 10.0):
        guesses = [_kernel_loop(apart[r][0, r], apart[r], best, weights, others[r], usual * factor) for r in range(13)]
        errors[usual * factor] = sum(weights[r] * ((guesses[r] - best[r]) ** 2).sum() for r in range(13))
    expected = min(errors, key=lambda key: errors[key])
    params, bandwidth = kernel_average(zoo, target)
    assert bandwidth == pytest.approx(expected, rel=1e-5)
    wanted = [_kernel_loop(query, described, best, weights, range(13), expected) for query in queries]
    np.testing.assert_allclose(_rows(params), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("most", "at_once"), [(1, 1), (7 * 3 * 134, 7)])  # 3 variants of two of three cities
def test_distances_of_some_regions_at_a_time_change_nothing(monkeypatch, most, at_once):
    zoo, target, _ = _problem(3, noise=0.1)

    def every() -> tuple:
        noisy = nearest_plus_noise(zoo, target, samples=2, key=jax.random.key(0))
        return nearest_prompt(zoo, target), kernel_average(zoo, target), noisy

    whole = every()
    held = []
    monkeypatch.setattr(nulls, "_MOST_DISTANCES", most)
    squared = nulls.squared_distances
    monkeypatch.setattr(nulls, "squared_distances", lambda one, other: held.append(len(one)) or squared(one, other))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7), every(), whole)
    assert max(held) == at_once


def test_the_kernel_narrows_where_prompts_tell_and_widens_where_they_do_not():
    zoo, target, true = _problem(2)
    params, narrow = kernel_average(zoo, target)
    assert np.corrcoef(_rows(params).ravel(), _rows(true).ravel())[0, 1] > 0.97
    noise = jnp.asarray(np.random.default_rng(1).normal(size=(3, 200, 3)), jnp.float32)
    deaf = dataclasses.replace(zoo, prompts=dataclasses.replace(zoo.prompts, values=noise))
    flat, wide = kernel_average(deaf, target)
    assert wide > 3 * narrow
    # A wide kernel is the mean of the zoo, hence shrinks what separates regions.
    assert _rows(flat).std(axis=0).mean() < 0.3 * _rows(true).std(axis=0).mean()


def test_the_noise_on_the_nearest_is_as_large_as_neighbours_in_other_cities_differ():
    zoo, target = _uneven()
    best, city = _rows(zoo.params)[:, 0], zoo.city_index
    weights = 1 / np.bincount(city)[city] / 3
    variance = np.zeros(5)
    for region in range(13):
        others, apart = np.flatnonzero(city != city[region]), _scaled_without(zoo, region)
        neighbour = min(others, key=lambda other: _shortest(apart[0, region], apart, other))
        variance += weights[region] * (best[region] - best[neighbour]) ** 2
    key = jax.random.key(0)
    drawn = _rows(nearest_plus_noise(zoo, target, samples=400, key=key))
    assert drawn.shape == (400, 20, 5)
    near = _rows(nearest_prompt(zoo, target))
    noise = (drawn - near) / np.sqrt(variance)
    np.testing.assert_allclose(noise.mean(axis=(0, 1)), 0.0, atol=0.05)
    np.testing.assert_allclose(noise.std(axis=(0, 1)), 1.0, atol=0.05)
    assert np.abs(np.corrcoef(noise.reshape(-1, 5), rowvar=False) - np.eye(5)).max() < 0.05
    # A region's noise hangs on its id and the sample alone.
    some = dataclasses.replace(target, values=target.values[:, 7:9], region_ids=target.region_ids[7:9])
    fewer = _rows(nearest_plus_noise(zoo, some, samples=3, key=key))
    np.testing.assert_array_equal(fewer, drawn[:3, 7:9])
    with pytest.raises(InputError, match="`samples` must be at least 1, got 0"):
        nearest_plus_noise(zoo, target, samples=0, key=key)


def test_the_noise_on_the_ridge_is_as_large_as_it_misses_cities_that_it_did_not_see():
    zoo, target = _uneven()
    key = jax.random.key(0)
    drawn = _rows(ridge_plus_noise(zoo, target, samples=400, key=key))
    assert drawn.shape == (400, 20, 5)
    centre, penalty = ridge_hypernetwork(zoo, target)
    best, city = _rows(zoo.params)[:, 0].astype(np.float64), zoo.city_index
    weights = 1 / np.bincount(city)[city] / 3
    variance = np.zeros(5)
    for left_out in range(3):
        rows = city != left_out
        apart = _scaled_without(zoo, int(np.flatnonzero(~rows)[0]))
        features = np.concatenate([apart, np.ones((*apart.shape[:2], 1))], axis=2)
        share = (weights[rows] / weights[rows].sum() / len(apart))[None, :, None]
        gram = np.einsum("vre,vrf->ef", features[:, rows] * share, features[:, rows])
        gram[:-1, :-1] += penalty * np.eye(len(gram) - 1)
        slopes = np.linalg.solve(gram, np.einsum("vre,rx->ex", features[:, rows] * share, best[rows]))
        misses = best[~rows] - features[0, ~rows] @ slopes
        variance += weights[~rows] @ np.square(misses)
    noise = (drawn - _rows(centre)) / np.sqrt(variance)
    np.testing.assert_allclose(noise.mean(axis=(0, 1)), 0.0, atol=0.05)
    np.testing.assert_allclose(noise.std(axis=(0, 1)), 1.0, atol=0.05)
    with pytest.raises(InputError, match="`samples` must be at least 1, got 0"):
        ridge_plus_noise(zoo, target, samples=0, key=key)


def test_gaussian_codes_are_spread_around_the_pooled_model_as_the_zoo_is_whatever_the_prompt():
    zoo, target, _ = _problem(2, noise=0.3)
    key = jax.random.key(0)
    drawn = _rows(gaussian_codes(zoo, target, directions=3, samples=2000, key=key)).astype(np.float64)
    assert drawn.shape == (2000, 20, 5)
    pooled = _rows(jax.tree.map(lambda leaf: leaf[None], zoo.pooled))[0]
    differences = _rows(zoo.params)[:, 0].astype(np.float64) - pooled
    weights = city_weights(zoo.city_index)
    second = (differences.T * (weights / weights.sum())) @ differences
    power, axes = np.linalg.eigh(second)
    want = (axes[:, -3:] * power[-3:]) @ axes[:, -3:].T
    noise = (drawn - pooled).reshape(-1, 5)
    np.testing.assert_allclose(noise.mean(axis=0), 0.0, atol=0.03 * np.sqrt(power[-1]))
    np.testing.assert_allclose(noise.T @ noise / len(noise), want, atol=0.03 * power[-1])
    moved = dataclasses.replace(target, values=target.values + 5)
    np.testing.assert_array_equal(_rows(gaussian_codes(zoo, moved, directions=3, samples=1, key=key)), drawn[:1])
    some = dataclasses.replace(target, values=target.values[:, 7:9], region_ids=target.region_ids[7:9])
    fewer = _rows(gaussian_codes(zoo, some, directions=3, samples=3, key=key))
    np.testing.assert_allclose(fewer, drawn[:3, 7:9], rtol=1e-6)
    with pytest.raises(InputError, match="`samples` must be at least 1, got 0"):
        gaussian_codes(zoo, target, directions=3, samples=0, key=key)


def test_a_zoo_of_one_region_gives_that_region():
    zoo, target, _ = _problem(1, regions=1)
    own = np.tile(_rows(zoo.params)[0, 0], (20, 1))
    for got in (
        nearest_prompt(zoo, target),
        kernel_average(zoo, target)[0],
        jax.tree.map(lambda leaf: leaf[0], nearest_plus_noise(zoo, target, samples=1, key=jax.random.key(0))),
    ):
        np.testing.assert_allclose(_rows(got), own, rtol=1e-6, atol=1e-6)


def test_a_city_that_is_left_out_has_no_part_in_the_scale_by_which_a_penalty_is_chosen(monkeypatch):
    zoo, _ = _uneven()
    values, seen = np.asarray(zoo.prompts.values), []
    differences = np.zeros((13, 2))
    monkeypatch.setattr(
        ridge, "scale_of", lambda values, city: seen.append(set(city.tolist())) or scale_of(values, city)
    )
    ridge.choose_penalty(values, differences, zoo.city_index)
    assert seen == [{1, 2}, {0, 2}, {0, 1}]
