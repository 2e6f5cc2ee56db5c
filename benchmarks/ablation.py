"""What every step of the forecaster is worth: the error of the pooled model, zero-shot, without it.

    python -m benchmarks.ablation [--quick] [--data_dir DIR] [--targets a,b] [--seed 0] [--steps 2000] [--few_shot]
        [--model stid] [--variations "whole,readings instead of anomalies"]

The targets and their few sources are those of `benchmarks.tables`. `value` is the mean absolute error of the test span,
the peer's that of the historical average; both also for weekdays and weekends. With --few_shot, the sources are
harvested, and the whole model is also fine-tuned on the support days, in codes, by one update, by both, and region by
region. Without --data_dir and GPDIFF_DATA, one target is simulated. A step is switched off from outside, by another
setting or, for this process, by another function in its place; what stands on it goes too: without kinds of day, there
is none that was seen, so damping is halved and every deviation wider; without anomalies, there is nothing to damp.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from absl import flags

import gpdiff_jax as gpd
from benchmarks.measuring import print_errors
from benchmarks.table_cases import TARGETS, Case
from experiments import command_line
from gpdiff_jax.baselines.rules import historical_average
from gpdiff_jax.cities import (
    City,
    SimulationConfig,
    expectation,
    find_cities,
    resample,
    select_channels,
    simulate_cities,
)
from gpdiff_jax.data import series
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.data.sources import Sources, prepare_sources
from gpdiff_jax.data.target import Target, prepare_target
from gpdiff_jax.errors import InputError
from gpdiff_jax.models import Model, make_model
from gpdiff_jax.models.anomaly import OTHER_KIND
from gpdiff_jax.models.loss import huber_sums
from gpdiff_jax.models.protocol import ModelSizes
from gpdiff_jax.prompts.sources import with_prompts
from gpdiff_jax.transfer.adapt_config import AdaptConfig
from gpdiff_jax.transfer.evaluate import few_shot, observed_truth, zero_shot
from gpdiff_jax.typing import Params
from gpdiff_jax.zoo import pooled as pooled_training
from gpdiff_jax.zoo.directions import zoo_directions
from gpdiff_jax.zoo.harvest import harvest_zoo
from gpdiff_jax.zoo.pooled import PooledConfig, broadcast_regions, train_pooled
from gpdiff_jax.zoo.region_training import HarvestConfig

flags.DEFINE_bool("quick", False, "few steps of training, to see that it runs")
flags.DEFINE_string("data_dir", None, "folder of city files; default GPDIFF_DATA, and without that simulated cities")
flags.DEFINE_list("targets", ["hangzhou_metro", "melbourne_pedestrians"], "the targets")
flags.DEFINE_string("model", "stid", "name of the forecaster")
flags.DEFINE_integer("steps", PooledConfig().steps, "training steps of the pooled model", 1)
flags.DEFINE_integer("seed", 0, "random seed", 0, 2**31 - 1)
flags.DEFINE_bool("few_shot", False, "also the ways of fine-tuning")
flags.DEFINE_list("variations", None, "some of the variations, by name; all if not given")

_BENCHMARK = "ablation"
_FINE_TUNED = {
    **{f"fine-tuned, {update}": AdaptConfig(update=update) for update in ("shared", "own")},
    "fine-tuned, codes": AdaptConfig(shared_steps=0),
    "fine-tuned, shared and codes": AdaptConfig(),
    "fine-tuned, codes on all kinds of day": AdaptConfig(shared_steps=0, seen_kinds_only=False),
}


class Variation(NamedTuple):
    """The forecaster with one step switched off."""

    data: Mapping[str, Any] = {}  # fields of `DataConfig` that differ
    anomaly: bool = True  # whether the model forecasts departures from what is expected
    other_kind: bool = True  # whether it sees what is expected of the other kind of day
    patches: tuple[tuple[Any, str, Any], ...] = ()  # module, name in it, what stands there instead


def _one_profile(readings: np.ndarray, slots: np.ndarray, weekend: Any, steps_per_day: int) -> expectation.Expectation:
    """The expectation of days that are all of one kind."""
    return expectation.expectation(readings, slots, None, steps_per_day)


def _one_deviation(squares: np.ndarray, freedom: np.ndarray, reach: int) -> np.ndarray:
    """The deviation of a single day, wherever it is asked for."""
    return np.full(squares.shape[::-1], expectation.ALONE)


def _rounder_loss(*args: Any) -> tuple[jax.Array, jax.Array]:
    return huber_sums(*args, delta=0.5)


VARIATIONS = {
    "whole": Variation(),
    "one profile for all days": Variation(patches=((series, "expectation", _one_profile),)),
    "one deviation for all regions": Variation(patches=((expectation, "_deviations", _one_deviation),)),
    "unseen kinds of day no wider": Variation(patches=((expectation, "UNLIKE", 0.0),)),
    "readings instead of anomalies": Variation(data={"damping": (1.0, 1.0)}, anomaly=False),
    "no damping": Variation(data={"damping": (1.0, 1.0)}),
    "nothing of the other kind of day": Variation(other_kind=False),
    "12 variants": Variation(data={"variants": 12}),
    "variants of any season": Variation(data={"near_days": 0.0}),
    "Huber loss with delta 0.5": Variation(patches=((pooled_training, "huber_sums", _rounder_loss),)),
}


@contextlib.contextmanager
def _switched(variation: Variation) -> Iterator[None]:
    """What a variation is made in; programs that were compiled without it are let go of, before and after."""
    with contextlib.ExitStack() as stack:
        for module, name, other in variation.patches:
            stack.enter_context(mock.patch.object(module, name, other))
        gpd.clear_caches()
        try:
            yield
        finally:
            gpd.clear_caches()


def _model(variation: Variation, sizes: ModelSizes) -> Model:
    model = make_model(flags.FLAGS.model, sizes._replace(anomaly=variation.anomaly))
    if variation.other_kind:
        return model

    def apply(params: Params, graph: Any, history: jax.Array, covariates: jax.Array) -> jax.Array:
        return model.apply(params, graph, history, covariates.at[..., OTHER_KIND].set(0.0))

    return model._replace(apply=apply, apply_batch=None)


def _cities(name: str) -> tuple[list[City], City]:
    """The sources of a target, and the target."""
    folder = flags.FLAGS.data_dir or os.environ.get("GPDIFF_DATA")
    if folder is None:
        *sources, target = simulate_cities(SimulationConfig(cities=4), seed=flags.FLAGS.seed)
        return sources, target
    case = Case(name, "four", "profile", flags.FLAGS.seed)
    found = find_cities(folder, (*case.cities, name))
    *sources, target = (resample(select_channels(city, "first")[0], case.interval_minutes) for city in found)
    return sources, target


def _report(case: str, city: City, forecast: np.ndarray, target: Target) -> None:
    """Mean absolute errors of the test span: of all readings, and by kind of day."""
    truth, weekend = observed_truth(city, target)
    windows: Any = {"history": target.sizes.history, "horizon": target.sizes.horizon}
    average = historical_average(city, target.split.support, np.asarray(target.test_starts), **windows)
    named = f"{city.name}: {flags.FLAGS.model}, {case}"
    print_errors(_BENCHMARK, named, forecast, truth, average, weekend=weekend, unit=city.unit)


def _report_few_shot(city: City, cities: list[City], model: Model, sources: Sources, pooled: Params) -> None:
    """The whole forecaster fine-tuned on the support days, in every way."""
    quick, key = flags.FLAGS.quick, jax.random.key(flags.FLAGS.seed)
    config = HarvestConfig(steps=20, evaluate_every=10, snapshots=2) if quick else HarvestConfig()
    zoo = harvest_zoo(model, with_prompts(sources, cities), pooled, config, key=jax.random.fold_in(key, 2))
    directions = zoo_directions(zoo, AdaptConfig().directions)
    target = prepare_target(city, sources.config)
    params = broadcast_regions(pooled, target.num_regions)
    for case, adapt in _FINE_TUNED.items():
        chosen = dataclasses.replace(adapt, steps=10) if quick else adapt
        tuned = few_shot(model, target, params, chosen, key=key, choice_params=params, directions=directions)
        _report(case, city, tuned.forecast, target)


def main(argv: list[str]) -> None:
    """Trains and measures every variation on every target."""
    del argv
    given, key = flags.FLAGS, jax.random.key(flags.FLAGS.seed)
    if unknown := [name for name in given.targets if name not in TARGETS]:
        raise InputError(f"--targets names {unknown[0]!r}; use some of {', '.join(TARGETS)}")
    chosen = VARIATIONS if given.variations is None else given.variations
    if unknown := [case for case in chosen if case not in VARIATIONS]:
        raise InputError(f"--variations names {unknown[0]!r}; use some of {', '.join(VARIATIONS)}")
    config = PooledConfig(steps=min(given.steps, 100) if given.quick else given.steps)
    real = given.data_dir or os.environ.get("GPDIFF_DATA")
    for name in given.targets if real else given.targets[:1]:
        cities, city = _cities(name)
        for case in chosen:
            variation = VARIATIONS[case]
            with _switched(variation):
                data = DataConfig(**variation.data)
                sources = prepare_sources(cities, data, key=jax.random.fold_in(key, 0))
                model = _model(variation, sources.sizes)
                pooled = train_pooled(model, sources, config, key=jax.random.fold_in(key, 1))
                target = prepare_target(city, data)
                params = broadcast_regions(pooled, target.num_regions)
                _report(case, city, zero_shot(model, target, params).forecast, target)
                if case == "whole" and given.few_shot:
                    _report_few_shot(city, cities, model, sources, pooled)


if __name__ == "__main__":
    command_line.run(main)
