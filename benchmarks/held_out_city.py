"""How well a pooled model forecasts a city that it never saw, beside the historical average of the support days.

    python -m benchmarks.held_out_city [--quick] [--data_dir DIR] [--cities a,b,c] [--held_out c] [--steps 2000]

Every held-out city is forecast by a model of the others, after several stretches of support days that are spread over
its series, for the seven days that follow each. Defaults are chosen by such errors, on cities that are nobody's target.
Without --data_dir and GPDIFF_DATA, cities are simulated. `value` is the mean absolute error over all stretches in the
unit of the city, the peer's that of the historical average; both also for weekdays, weekends and every horizon step.
With --code_rates, the other cities are harvested too, and their pooled model is fine-tuned in codes alone at each rate;
with --shared_steps, it is fine-tuned by one update for the city.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags

from benchmarks.cities import cities_of_flags, held_out_names
from benchmarks.held_out_stretches import stretches
from benchmarks.measuring import print_errors, print_line
from experiments import command_line
from gpdiff_jax.baselines.autoregression import line_config, residual_autoregression
from gpdiff_jax.baselines.boosted_trees import BoostedTreesConfig, boosted_trees, forecast_trees
from gpdiff_jax.baselines.rules import historical_average
from gpdiff_jax.cities import City
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.data.series import COVARIATES
from gpdiff_jax.data.sources import Sources, prepare_sources
from gpdiff_jax.data.target import Target
from gpdiff_jax.errors import InputError
from gpdiff_jax.models import Model, make_model
from gpdiff_jax.prompts.sources import with_prompts
from gpdiff_jax.transfer.adapt_config import AdaptConfig
from gpdiff_jax.transfer.evaluate import few_shot, observed_truth, zero_shot
from gpdiff_jax.typing import Key, Params
from gpdiff_jax.zoo.directions import zoo_directions
from gpdiff_jax.zoo.harvest import harvest_zoo
from gpdiff_jax.zoo.pooled import PooledConfig, broadcast_regions, train_pooled
from gpdiff_jax.zoo.region_training import HarvestConfig

flags.DEFINE_bool("quick", False, "one held-out city, few steps and stretches; ends within two minutes")
flags.DEFINE_string("data_dir", None, "folder of city files; default GPDIFF_DATA, and without that simulated cities")
flags.DEFINE_list(
    "cities",
    ["taipei_metro", "paris_bike_counters", "sf_bike_2014", "auckland_pedestrians", "nyc_bike_2016"],
    "the cities of a folder to take",
)
flags.DEFINE_list("held_out", None, "cities to hold out, one after another; all if not given")
flags.DEFINE_integer("interval_minutes", 60, "interval that cities are resampled to", 1, 1440)
flags.DEFINE_integer("support_days", 3, "visible days of a stretch", 1)
flags.DEFINE_integer("stretches", 6, "stretches of support days in a held-out city", 1)
flags.DEFINE_string("model", "stid", "name of the forecaster")
flags.DEFINE_enum("covariates", "profile", COVARIATES, "what models see beside the readings")
flags.DEFINE_integer("steps", PooledConfig().steps, "training steps of the pooled model", 1)
flags.DEFINE_integer("seed", 0, "random seed", 0, 2**31 - 1)
flags.DEFINE_bool("rivals", False, "also the linear autoregression and boosted trees, fitted on the other cities")
flags.DEFINE_list("code_rates", [], "rates at which the pooled model is fine-tuned in codes, without momentum")
flags.DEFINE_list("shared_steps", [], "steps for which the pooled model is fine-tuned by one update for the city")
flags.DEFINE_integer("code_steps", None, "steps of that; as many as a run takes if not given", 1)
flags.DEFINE_integer("directions", AdaptConfig().directions, "directions of that", 1)

_BENCHMARK = "held_out_city"


def _adaptations() -> dict[str, AdaptConfig]:
    """Fine-tuning in codes at every rate, and by a shared update for every number of steps, that was asked for."""
    given = flags.FLAGS
    try:
        rates = [float(word) for word in given.code_rates]
        steps = [int(word) for word in given.shared_steps]
    except ValueError as error:
        asked = ",".join((*given.code_rates, *given.shared_steps))
        raise InputError(f"--code_rates and --shared_steps (={asked}) must be numbers, as 1,3") from error
    more = {"code_steps": given.code_steps, "directions": given.directions, "code_momentum": 0.0, "shared_steps": 0}
    codes = {f"codes_{rate:g}": AdaptConfig(code_rate=rate, **more) for rate in rates}
    return codes | {
        f"shared_{count}": AdaptConfig(update="shared", shared_steps=count, shared_folds=0) for count in steps
    }


def _directions(model: Model, sources: Sources, cities: list[City], pooled: Params, *, key: Key) -> Params:
    """The directions of the other cities, which are harvested for them."""
    config = HarvestConfig(steps=20, evaluate_every=10, snapshots=2) if flags.FLAGS.quick else HarvestConfig()
    zoo = harvest_zoo(model, with_prompts(sources, cities), pooled, config, key=key)
    return zoo_directions(zoo, flags.FLAGS.directions)


def _rivals(sources: Sources, config: PooledConfig, *, key: Key) -> dict[str, Callable[[Target], np.ndarray]]:
    """Other forecasters of the sources, by name: each makes of a target its forecasts."""
    linear = residual_autoregression(sources.sizes)
    fitted = train_pooled(linear, sources, line_config(config), key=key)
    trees = boosted_trees(sources, BoostedTreesConfig(), key=key)

    def autoregression(target: Target) -> np.ndarray:
        return zero_shot(linear, target, broadcast_regions(fitted, target.num_regions)).forecast

    return {"residual autoregression": autoregression, "boosted trees": lambda target: forecast_trees(trees, target)}


def _print_errors(city: City, forecasts: list[dict[str, np.ndarray]], truths: list[tuple]) -> None:
    """Mean absolute errors over all stretches: of all readings, by kind of day, and by horizon step."""
    truth = np.concatenate([values for values, _ in truths])
    weekend = None if truths[0][1] is None else np.concatenate([days for _, days in truths])
    joined = {name: np.concatenate([made[name] for made in forecasts]) for name in forecasts[0]}
    average, steps = joined.pop("historical average"), np.arange(truth.shape[2])
    more = {f"step_{step + 1}": np.broadcast_to(steps == step, truth.shape) for step in steps}
    for method, made in joined.items():
        case = f"{city.name}: {method}"
        print_errors(_BENCHMARK, case, made, truth, average, weekend=weekend, unit=city.unit, parts=more)


def main(argv: list[str]) -> None:
    """Trains without every held-out city in turn, and measures on it."""
    del argv
    quick, cities, given, tuned = flags.FLAGS.quick, cities_of_flags(), flags.FLAGS, _adaptations()
    data = DataConfig(covariates=given.covariates, support_days=given.support_days)
    config = PooledConfig(steps=min(given.steps, 100) if quick else given.steps)
    key = jax.random.key(given.seed)
    for name in held_out_names(cities):
        city = next(one for one in cities if one.name == name)
        others = [other for other in cities if other.name != name]
        sources = prepare_sources(others, data, key=jax.random.fold_in(key, 0))
        model, begin = make_model(given.model, sources.sizes), time.perf_counter()
        pooled = jax.block_until_ready(train_pooled(model, sources, config, key=jax.random.fold_in(key, 1)))
        print_line(_BENCHMARK, f"without_{name}", "training", time.perf_counter() - begin, "s")
        rivals = _rivals(sources, config, key=jax.random.fold_in(key, 3)) if given.rivals else {}
        directions = (
            _directions(model, sources, others, pooled, key=jax.random.fold_in(key, 2)) if given.code_rates else None
        )
        forecasts, truths = [], []
        for target in stretches(city, data, 2 if quick else given.stretches):
            starts = np.asarray(target.test_starts)
            windows: Any = {"history": data.history, "horizon": data.horizon}
            params = broadcast_regions(pooled, target.num_regions)
            made = {
                "pooled": zero_shot(model, target, params).forecast,
                "historical average": historical_average(city, target.split.support, starts, **windows),
            }
            made |= {rival: forecast(target) for rival, forecast in rivals.items()}
            for case, adapt in tuned.items():
                made[case] = few_shot(model, target, params, adapt, key=key, directions=directions).forecast
            forecasts.append(made)
            truths.append(observed_truth(city, target))
        _print_errors(city, forecasts, truths)


if __name__ == "__main__":
    command_line.run(main)
