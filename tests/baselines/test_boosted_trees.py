"""In: windows with gaps, and cities whose anomalies fade. Out: the inputs of trees, and trees that forecast so."""

import dataclasses
import sys

import jax
import numpy as np
import pytest

from gpdiff_jax.baselines import boosted_trees as module
from gpdiff_jax.baselines.boosted_trees import BoostedTrees, BoostedTreesConfig, boosted_trees, forecast_trees
from gpdiff_jax.cities import City
from gpdiff_jax.cities.splits import split_source
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.data.sources import Sources, prepare_sources
from gpdiff_jax.data.target import Target, prepare_target, region_windows
from gpdiff_jax.errors import InputError
from gpdiff_jax.models.anomaly import LOG_DEVIATION, PROFILE
from gpdiff_jax.run.run import Run
from gpdiff_jax.run.settings import DEFAULT_METHODS, METHODS, choose_methods
from gpdiff_jax.transfer.evaluate import observed_truth
from tests.runs import tiny_settings

_CONFIG = BoostedTreesConfig(trees=40, leaves=8, windows=128, learning_rate=0.3)


def _fading(cities: list[City]) -> list[City]:
    """Days repeat but for a deviation that keeps nine tenths of itself in every hour; a reading in ten is missing."""
    rng = np.random.default_rng(1)
    made = []
    for city in cities:
        hours, deviation = np.arange(city.num_steps), np.zeros((city.num_steps, city.num_nodes))
        for hour in hours[1:]:
            deviation[hour] = 0.9 * deviation[hour - 1] + rng.normal(size=city.num_nodes)
        values = 100 + 20 * np.sin(2 * np.pi * hours / 24)[:, None] + deviation
        values[rng.random(values.shape) < 0.1] = np.nan
        made.append(dataclasses.replace(city, values=values[..., None].astype(np.float32)))
    return made


def _prepared(cities: list[City], covariates: str) -> tuple[City, Sources, Target]:
    *others, city = _fading(cities)
    data = DataConfig(covariates=covariates, variants=4, horizon=3, max_neighbours=3, damping=(1.0, 1.0))
    return city, prepare_sources(others, data, key=jax.random.key(0), validation_windows=24), prepare_target(city, data)


@pytest.mark.parametrize("covariates", ["profile", "none"])
def test_trees_see_what_was_read_and_forecast_how_anomalies_fade(simulated_cities, covariates):
    city, sources, target = _prepared(simulated_cities, covariates)
    told = []
    trees = boosted_trees(sources, _CONFIG, key=jax.random.key(1), progress=lambda *line: told.append(line))
    assert [step for step, _ in told] == [1, 2, 3] and all(0 < line["trees"] <= 40 for _, line in told)
    forecast = forecast_trees(trees, target)
    truth = observed_truth(city, target)[0]
    hours = np.asarray(target.test_starts)[:, None] + target.bank.history + np.arange(3)
    expected = 100 + 20 * np.sin(2 * np.pi * hours / 24)
    # The first step's deviation has a standard deviation of 2.3 where nothing is known of it, and of 1 after the last.
    error, blind = (np.nanmean(np.abs(made - truth), axis=(0, 1)) for made in (forecast, expected[:, None]))
    assert error[0] < 0.9 * blind[0]
    assert error[0] < error[1] < error[2]
    # What is stored forecasts the same.
    again = BoostedTrees.from_arrays(trees.arrays(), trees.sizes)
    np.testing.assert_array_equal(forecast_trees(again, target), forecast)
    # So does a second training.
    assert boosted_trees(sources, _CONFIG, key=jax.random.key(1)) == trees
    with pytest.raises(InputError, match="the trees were fitted to ModelSizes"):
        forecast_trees(dataclasses.replace(trees, sizes=trees.sizes._replace(history=5)), target)


@pytest.mark.parametrize("kind", ["profile", "calendar", "none"])
def test_inputs_are_those_of_the_models(simulated_cities, kind):
    _, _, target = _prepared(simulated_cities, kind)
    region = np.int32(2)
    graph, windows = jax.jit(region_windows)(target, region, target.test_starts)
    graph = jax.device_get(graph)
    history, covariates, wanted, mask = (
        np.asarray(part) for part in (windows.history, windows.covariates, windows.target, windows.mask)
    )
    seen = jax.device_get(module._target_rows(target, region)[2])
    observed = history[..., 1] > 0
    neighbours = [(graph.senders[e], graph.edges[e]) for e in range(graph.n_edge[0]) if graph.receivers[e] == 0]
    assert len(neighbours) > 1 and not observed[:, 0].all()
    channel = 2 if kind == "profile" else 0
    columns = []
    for hour in range(12):
        at = history[:, :, hour, channel]
        total = sum(weight * observed[:, node, hour] * at[:, node] for node, weight in neighbours)
        with np.errstate(invalid="ignore"):
            columns.append(total / sum(weight * observed[:, node, hour] for node, weight in neighbours))
    own = np.where(observed[:, 0, :, None], history[:, 0], np.nan)
    want = [own[..., 0], np.stack(columns, axis=1)]
    if kind == "profile":
        want += [own[..., 2], *np.moveaxis(history[:, 0, :, 3:], -1, 0)]
    np.testing.assert_allclose(seen.past, np.concatenate(want, axis=1), rtol=1e-5, atol=1e-5)
    ahead = covariates[:, 12:]
    np.testing.assert_array_equal(seen.inputs(1)[:, seen.past.shape[1] :], ahead[:, 1])
    deviation = np.exp(ahead[..., LOG_DEVIATION]) if kind == "profile" else 1.0
    profile = ahead[..., PROFILE] if kind == "profile" else 0.0
    known = mask > 0
    np.testing.assert_allclose((profile + deviation * seen.wanted)[known], wanted[known], rtol=1e-4, atol=1e-4)
    # Weighted so, an error of what they say is an error of the reading.
    np.testing.assert_allclose(seen.weight, mask * deviation, rtol=1e-5)


def test_without_a_reading_to_validate_on_all_trees_are_taken(simulated_cities):
    cities = []
    for city in simulated_cities[:2]:
        values = city.values.copy()
        # What the validation windows forecast is hidden, but for one reading that makes them windows.
        begin = split_source(city.num_steps, history=12, horizon=3, name=city.name).validation.start
        values[begin:] = np.nan
        values[-1, 0] = 1.0
        cities.append(dataclasses.replace(city, values=values))
    data = DataConfig(covariates="calendar", variants=4, horizon=3)
    sources = prepare_sources(cities, data, key=jax.random.key(0), validation_windows=8)
    told = []
    small = dataclasses.replace(_CONFIG, trees=6, windows=8)
    boosted_trees(sources, small, key=jax.random.key(1), progress=lambda *line: told.append(line))
    # That reading is at the last step of the horizon in the last window alone.
    assert [line for _, line in told[:2]] == [{"trees": 6}] * 2 and "validation_loss" in told[2][1]


def test_without_lightgbm_the_default_methods_do_without_it_and_say_so(data_dir, tmp_path, monkeypatch, capsys):
    assert choose_methods(["default"]) == DEFAULT_METHODS and choose_methods(["all"]) == METHODS
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    module.has_lightgbm.cache_clear()
    try:
        assert set(DEFAULT_METHODS) - set(choose_methods(["default"])) == {"boosted_trees"}
        rules = tiny_settings(data_dir, methods=("historical_average",))
        Run.open(tmp_path / "rules", rules).close()
        assert "LightGBM" not in capsys.readouterr().err
        Run.open(tmp_path / "default", tiny_settings(data_dir, methods=("default",))).close()
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "LightGBM" in line]
        assert "boosted_trees is left out" in line and 'pip install "gpdiff_jax[trees]"' in line
        with pytest.raises(InputError, match="`boosted_trees` needs LightGBM, which cannot be imported"):
            Run.open(tmp_path / "named", tiny_settings(data_dir, methods=("boosted_trees",)))
    finally:
        module.has_lightgbm.cache_clear()
