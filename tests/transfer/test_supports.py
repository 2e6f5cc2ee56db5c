"""In: one city after supports of its own. Out: the same programs forecast them, and tune as is forecast."""

import dataclasses

import jax
import numpy as np
import pytest

import gpdiff_jax as gpd
from gpdiff_jax.cities.splits import Span, split_before
from gpdiff_jax.data.region_graphs import region_graphs
from gpdiff_jax.data.target import prepare_target, split_city
from gpdiff_jax.data.windows import window_starts
from gpdiff_jax.transfer.adapt import adapt
from gpdiff_jax.transfer.evaluate import few_shot, zero_shot
from gpdiff_jax.transfer.quantiles import forecast_quantiles
from gpdiff_jax.zoo.pooled import broadcast_regions, initial_params
from tests.compilations import programs_made

_DATA = gpd.DataConfig(max_neighbours=3)


def _far_off(params: dict) -> dict:
    """Parameters that forecast badly enough for every step to do them good."""
    random = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + random.normal(0, 0.3, leaf.shape).astype(np.float32), params)


@pytest.mark.parametrize("update", ["codes", "shared"])
def test_another_support_of_a_city_compiles_nothing(simulated_cities, update):
    city = simulated_cities[0]
    values = np.array(city.values)
    values[8 * 24 : 11 * 24, 3] = np.nan  # silent in the second support
    city, graphs = dataclasses.replace(city, values=values), region_graphs([city], max_neighbours=3, pick="weight")
    config = gpd.AdaptConfig(update=update, code_steps=2, shared_steps=2)

    def forecasts(day: int) -> list[np.ndarray]:
        test = Span(day * 24, (day + 1) * 24)
        split = split_before(test, 24, 3, history=12, before="the day", name=city.name)
        starts = window_starts(city, test, history=12, horizon=6, reach_back=True)
        target = split_city(city, _DATA, split, starts, graphs=graphs)
        model = gpd.make_model("tiny", target.sizes)
        first = _far_off(initial_params(model, target.graphs, target.sizes, key=jax.random.key(0)))
        start = broadcast_regions(first, city.num_nodes)
        random = np.random.default_rng(0)
        directions = jax.tree.map(lambda leaf: random.normal(0, 0.1, (2, *leaf.shape)).astype(np.float32), first)
        made = zero_shot(model, target, start)
        tuned = few_shot(model, target, start, config, key=jax.random.key(1), directions=directions)
        quantiles = forecast_quantiles(model, target, start, made, None)
        assert quantiles is not None and (tuned.forecast != made.forecast).any()
        return [made.forecast, tuned.forecast, quantiles]

    one = forecasts(4)  # Fridays, after days of their kind
    with programs_made() as programs:
        other = forecasts(11)
    assert programs == []
    assert all((a != b).any() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("update", ["codes", "shared"])
def test_parameters_are_tuned_for_forecasts_as_they_will_be_damped(simulated_cities, update):
    city = simulated_cities[0]
    target = prepare_target(city, _DATA)
    model = gpd.make_model("tiny", target.sizes)
    first = _far_off(initial_params(model, target.graphs, target.sizes, key=jax.random.key(0)))
    random = np.random.default_rng(0)
    directions = jax.tree.map(lambda leaf: random.normal(0, 0.1, (2, *leaf.shape)).astype(np.float32), first)
    config = gpd.AdaptConfig(update=update, code_steps=2, shared_steps=2)
    tuned = [
        adapt(
            model,
            config,
            dataclasses.replace(target, damping=damping),
            broadcast_regions(first, city.num_nodes),
            key=jax.random.key(1),
            directions=directions,
        ).params
        for damping in ((1.0, 1.0), (0.3, 0.3))
    ]
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, tuned), strict=True))
