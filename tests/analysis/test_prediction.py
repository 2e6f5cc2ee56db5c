"""In: zoos whose parameters are a known function of one part of the prompt. Out: the shares that a plain loop gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from gpdiff_jax.analysis.prediction import (
    ParameterPrediction,
    Predicted,
    PredictionConfig,
    explained_variance,
    predict_parameters,
)
from gpdiff_jax.baselines.ridge import PENALTIES
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.data.sources import prepare_sources
from gpdiff_jax.errors import InputError
from gpdiff_jax.models import make_model
from gpdiff_jax.prompts.encoders import columns_of_parts
from gpdiff_jax.prompts.prompt import Prompts
from gpdiff_jax.prompts.sources import with_prompts
from gpdiff_jax.zoo.parameter_zoo import HeldVectors, ParameterZoo
from gpdiff_jax.zoo.pooled import initial_params, validation_error

_NAMES = ("profile_00h", "log_level", "temporal_000", "temporal_001", "spatial_000")
_PARTS = ("statistics", "temporal", "spatial", "all")


@pytest.fixture(scope="module", name="zoo")
def _zoo(simulated_cities) -> ParameterZoo:
    """Three cities whose parameters are linear in the two temporal columns; the other columns are noise."""
    sources = with_prompts(
        prepare_sources(simulated_cities, DataConfig(variants=2, max_neighbours=3), key=jax.random.key(0)),
        simulated_cities,
    )
    model = make_model("stid", sources.sizes)
    pooled = initial_params(model, sources.graphs, sources.sizes, key=jax.random.key(1))
    flat, unravel = ravel_pytree(pooled)
    rng = np.random.default_rng(0)
    regions = sources.num_regions
    described = rng.normal(size=(1, regions, 5)).astype(np.float32)
    slopes = 0.05 * rng.normal(size=(2, len(flat))).astype(np.float32)
    vectors = np.asarray(flat) + described[0, :, 2:4] @ slopes + 0.01 * rng.normal(size=len(flat)).astype(np.float32)
    best = jax.vmap(unravel)(jnp.asarray(vectors, jnp.float32))
    return ParameterZoo(
        model="stid",
        pooled=pooled,
        vectors=HeldVectors(jax.tree.map(lambda leaf: np.stack([leaf, leaf + 1], axis=1), best)),
        validation_mae=np.ones((regions, 2), np.float32),
        start_mae=np.ones(regions, np.float32),
        step=np.ones((regions, 2), np.int32),
        seed=np.zeros((regions, 2), np.int32),
        data_window=np.zeros((regions, 2), np.int32),
        prompts=Prompts(jnp.asarray(np.repeat(described, 2, axis=0)), sources.region_ids, _NAMES),
        names=sources.names,
        city_index=np.asarray(sources.city_index),
        sources=sources,
    )


@pytest.fixture(scope="module", name="found")
def _found(zoo) -> ParameterPrediction:
    return predict_parameters(zoo)


def _of(found: ParameterPrediction, predictor: str) -> list[Predicted]:
    return [row for row in found.predicted if row.predictor == predictor]


def _vectors(zoo: ParameterZoo) -> np.ndarray:
    rows = [np.asarray(leaf)[:, 0].reshape(zoo.num_regions, -1) for leaf in jax.tree.leaves(zoo.params)]
    return np.concatenate(rows, axis=1).astype(np.float64)


def test_the_part_that_holds_the_parameters_predicts_them_and_noise_does_not(found):
    assert [(city.regions, city.components) for city in found.cities] == [(8, 2)] * 3
    for row in _of(found, "temporal"):
        assert row.r2 > 0.98 and row.r2_within > 0.98 and row.penalty == PENALTIES[0]
    # Two cities of eight regions are few, so that a ridge of five columns shrinks what it should not.
    assert all(row.r2 > 0.9 for row in _of(found, "all"))
    for part in ("statistics", "spatial"):
        assert all(row.r2 < 0.2 for row in _of(found, part))
        assert np.mean([row.r2 for row in _of(found, part)]) < 0
    for name in ("projection", "own_parameters"):
        assert all(row.r2 == pytest.approx(1) == row.r2_within for row in _of(found, name))
    # What is the same for all regions of a city tells none apart, and is further off than their mean.
    for name in ("pooled_unchanged", "zoo_mean"):
        assert all(row.r2 < 0 and row.r2_within == pytest.approx(0, abs=1e-6) for row in _of(found, name))
        assert all(row.penalty is None for row in _of(found, name))


def test_errors_are_those_of_the_forecasters_with_these_parameters(zoo, found):
    sources, model = zoo.sources, make_model(zoo.model, zoo.sources.sizes)

    @jax.jit
    def error(params, sources, region):
        return validation_error(model, params, sources.bank, sources.train, region)

    best = jax.tree.map(lambda leaf: leaf[:, 0], zoo.params)
    own, unchanged = [], []
    for row in range(zoo.num_regions):
        region = jax.tree.map(lambda leaf, row=row: leaf[row], sources.regions)
        own.append(float(error(jax.tree.map(lambda leaf, row=row: jnp.asarray(leaf[row]), best), sources, region)))
        unchanged.append(float(error(zoo.pooled, sources, region)))
    for name, errors in (("own_parameters", own), ("pooled_unchanged", unchanged)):
        expected = np.asarray(errors).reshape(3, 8).mean(axis=1)
        np.testing.assert_allclose([row.mae for row in _of(found, name)], expected, rtol=1e-4)
    # The truth lies in the plane of the components, and what is found from the temporal part lies near it.
    projected, described, past = (
        [row.mae for row in _of(found, name)] for name in ("projection", "temporal", "zoo_mean")
    )
    true = np.asarray([row.mae for row in _of(found, "own_parameters")])
    np.testing.assert_allclose(projected, true, rtol=1e-4)
    assert (np.abs(described - true) < 0.3 * np.abs(past - true)).all()


def _loop_r2(zoo: ParameterZoo, city: int, columns: list[int], components: int, penalty: float) -> float:
    """Components by SVD of the other cities, a ridge by least squares on rows that stand for the penalty."""
    rows = zoo.city_index != city
    prompts = np.asarray(zoo.prompts.values, np.float64)[0][:, columns]
    prompts = np.clip((prompts - prompts[rows].mean(axis=0)) / (prompts[rows].std(axis=0) + 1e-3), -4, 4)
    vectors = _vectors(zoo)
    mean = vectors[rows].mean(axis=0)
    axes = np.linalg.svd(vectors[rows] - mean, full_matrices=False)[2][:components]
    latents = (vectors - mean) @ axes.T
    count, width = rows.sum(), len(columns)
    features = np.append(prompts[rows], np.ones((count, 1)), axis=1)
    stacked = np.concatenate([features / np.sqrt(count), np.sqrt(penalty) * np.eye(width, width + 1)])
    wanted = np.concatenate([latents[rows] / np.sqrt(count), np.zeros((width, components))])
    solution = np.linalg.lstsq(stacked, wanted, rcond=None)[0]
    squared = total = 0.0
    for region in np.flatnonzero(~rows):
        made = np.append(prompts[region], 1.0) @ solution
        squared += np.square(made - latents[region]).sum()
        total += np.square(latents[region] - latents[~rows].mean(axis=0)).sum()
    return 1 - squared / total


@pytest.mark.parametrize(
    ("part", "columns"),
    [("statistics", [0, 1]), ("temporal", [2, 3]), ("spatial", [4]), ("all", [0, 1, 2, 3, 4])],
)
def test_shares_agree_with_a_loop(zoo, found, part, columns):
    for city, row in enumerate(_of(found, part)):
        assert row.r2 == pytest.approx(_loop_r2(zoo, city, columns, 2, row.penalty), rel=1e-3, abs=1e-3)


def test_parameters_of_the_left_out_city_change_nothing_that_is_predicted_for_it(zoo, found):
    """Other parameters in city 1: its predictions, their errors and the penalties stay."""
    own = zoo.city_index == 1
    shape = (-1,) + (1,) * 9

    def moved(leaf):
        return np.where(own.reshape(shape[: leaf.ndim]), leaf * np.float32(-2) + np.float32(0.3), leaf)

    params = jax.tree.map(moved, zoo.params)
    other = predict_parameters(dataclasses.replace(zoo, vectors=HeldVectors(params)))
    for name in (*_PARTS, "pooled_unchanged", "zoo_mean"):
        before, after = _of(found, name), _of(other, name)
        assert after[1].mae == before[1].mae and after[1].penalty == before[1].penalty, name
    assert _of(other, "own_parameters")[1].mae != _of(found, "own_parameters")[1].mae
    # The cities that learn from it do notice.
    assert _of(other, "zoo_mean")[0].mae != _of(found, "zoo_mean")[0].mae
    # Neither do its prompts: they do not enter the scale by which the others' are read.
    values = np.array(zoo.prompts.values)
    values[:, own] *= 5
    shifted = predict_parameters(dataclasses.replace(zoo, prompts=zoo.prompts.replace(values=jnp.asarray(values))))
    assert [row.penalty for row in _of(shifted, "all")][1] == _of(found, "all")[1].penalty
    assert _of(shifted, "temporal")[1].r2 != _of(found, "temporal")[1].r2


def test_components_are_as_many_as_the_share_asks_for(zoo):
    one = predict_parameters(zoo, PredictionConfig(most_components=1))
    assert all(city.components == 1 and city.variance < 0.95 for city in one.cities)
    # What one component cannot hold, the projection on it loses.
    assert all(city.variance_here < 0.99 for city in one.cities)
    assert all(a.mae != b.mae for a, b in zip(_of(one, "projection"), _of(one, "own_parameters"), strict=True))
    many = predict_parameters(zoo, PredictionConfig(variance=1.0))
    assert all(city.components == 2 and city.variance == pytest.approx(1) for city in many.cities)


def test_shares_by_hand():
    true, made = np.asarray([[0.0], [2.0], [4.0]]), np.asarray([[3.0], [5.0], [7.0]])
    assert explained_variance(true, made) == (pytest.approx(1 - 27 / 8), 1.0)
    assert np.isnan(explained_variance(true[:1], made[:1])).all()


def test_columns_go_by_their_names():
    parts = columns_of_parts(("spatial_statistic", *_NAMES, "temporal_010"))
    assert {part: columns.tolist() for part, columns in parts.items()} == {
        "statistics": [0, 1, 2],
        "temporal": [3, 4, 6],
        "spatial": [5],
    }


def test_what_cannot_be_predicted_is_refused(zoo):
    with pytest.raises(InputError, match="no sources attached"):
        predict_parameters(dataclasses.replace(zoo, sources=None))
    with pytest.raises(InputError, match="holds 1 city; name two sources"):
        predict_parameters(dataclasses.replace(zoo, city_index=np.zeros_like(zoo.city_index)))
    with pytest.raises(InputError, match=r"`variance` must be above 0 and at most 1, got 1.5"):
        PredictionConfig(variance=1.5)
    with pytest.raises(InputError, match=r"`most_components` must be at least 1, got 0"):
        PredictionConfig(most_components=0)
