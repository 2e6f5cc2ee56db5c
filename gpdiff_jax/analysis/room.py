"""In: a city, and a generator that never saw it. Out: what the regions' own parameters gain, and what is reached of it.

The room is the error of the pooled model of other cities minus that of the best parameters that were trained on the
city's own months, each region's own or one vector for all. A forecaster that has seen a few days reaches some share of
it, by prompts alone or by fine-tuning.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from gpdiff_jax.analysis.shuffled_prompts import shuffle
from gpdiff_jax.baselines.rules import historical_average
from gpdiff_jax.cities.city import City
from gpdiff_jax.cities.splits import Span, split_before, split_source
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.data.region_graphs import region_graphs
from gpdiff_jax.data.sources import Sources, prepare_sources
from gpdiff_jax.data.target import Target, split_city
from gpdiff_jax.data.windows import window_starts
from gpdiff_jax.errors import InputError, check_at_least, named
from gpdiff_jax.hypernetwork import GenerateConfig, Hypernetwork
from gpdiff_jax.models.protocol import Model
from gpdiff_jax.prompts.prompt import region_prompts
from gpdiff_jax.prompts.sources import with_prompts
from gpdiff_jax.transfer.adapt_config import AdaptConfig
from gpdiff_jax.transfer.evaluate import few_shot, observed_truth, zero_shot
from gpdiff_jax.transfer.posterior import PosteriorConfig, posterior_shot
from gpdiff_jax.typing import Key, Params
from gpdiff_jax.zoo.harvest import harvest_zoo
from gpdiff_jax.zoo.pooled import PooledConfig, broadcast_regions, train_pooled
from gpdiff_jax.zoo.region_training import HarvestConfig

LEAST_ROOM = 0.01
"""Of the pooled model's error; what is a share of less is a share of chance."""
METHODS = (
    "historical_average",
    "pooled",
    "generated",
    "generated_shuffled",  # from prompts of other regions of the city
    "pooled_adapted",
    "generated_adapted",
    "generated_posterior",  # drawn in the light of the support days
    "city",
    "own",
)


@dataclasses.dataclass(frozen=True)
class RoomConfig:
    """What a city's own parameters are, and what stands beside them.

    `harvest` trains every region from the pooled model of the other cities, `city` the model that all its regions
    share, from there too. Errors are means over `stretches` of at most `test_days` days of the city's last 20 %, each
    forecast after the `support_days` right before it. Neither was trained there, but both were stopped where they were
    best there, so that the room is an upper bound, and shares of it are lower ones.
    """

    support_days: int = 3
    stretches: int = 6
    test_days: int = 7
    harvest: HarvestConfig = HarvestConfig()
    city: PooledConfig = PooledConfig(steps=400, learning_rate=1e-3, averaging=0.0, mixing=0.0)
    generate: GenerateConfig = GenerateConfig()
    adapt: AdaptConfig = AdaptConfig()
    posterior: PosteriorConfig = PosteriorConfig()

    def __post_init__(self) -> None:
        check_at_least(1, named(self, "support_days", "stretches", "test_days"))


class OwnParameters(NamedTuple):
    """What was trained on the first 80 % of a city that the generator never saw."""

    own: Params  # leaves [1, R, ...]: every region's; of regions without a reading there, the pooled model's
    city: Params  # the same for all regions


def own_parameters(
    city: City, model: Model, pooled: Params, data: DataConfig, config: RoomConfig, *, key: Key
) -> OwnParameters:
    """Trains a city's own parameters, and one model for all its regions, both from the pooled model of other cities.

    Args:
      city: one channel, at the interval of the model.
      model: the forecaster.
      pooled: of cities that are not this one.
      data: windows, as the pooled model saw them.
      config: how they are trained.
      key: random key.

    Returns:
      The parameters with the best validation error on the last 20 %: they are what could be reached at best.

    Raises:
      InputError: the windows are of the paper's protocol; see `prepare_sources` and `harvest_chunks`.
      NotFiniteError: a loss is not finite.
    """
    refuse_paper(data)
    source_key, city_key, own_key = jax.random.split(key, 3)
    sources: Sources = prepare_sources([city], data, key=source_key)
    of_city = train_pooled(model, sources, config.city, key=city_key, start=pooled)
    zoo = harvest_zoo(model, with_prompts(sources, [city]), pooled, config.harvest, key=own_key)
    rows = [city.node_ids.index(name.split("/", 1)[1]) for name in zoo.names]
    own = jax.tree.map(np.array, broadcast_regions(pooled, city.num_nodes))
    for leaf, trained in zip(jax.tree.leaves(own), jax.tree.leaves(zoo.params), strict=True):
        leaf[0, rows] = np.asarray(trained)[:, 0]
    return OwnParameters(own, jax.tree.map(np.array, broadcast_regions(of_city, city.num_nodes)))


def refuse_paper(data: DataConfig) -> None:
    """Raises `InputError` for windows of the paper's protocol, which train on what the room is measured on."""
    if data.protocol != "leak-free":
        raise InputError(
            f"`protocol` (={data.protocol!r}) trains on what the room is measured on; it must be leak-free"
        )


def held_out_targets(city: City, data: DataConfig, config: RoomConfig) -> list[Target]:
    """The city after each of several supports, in its last 20 %.

    Args:
      city: one channel.
      data: windows and graphs.
      config: days and stretches.

    Returns:
      Targets in order of time, spread over the last 20 %, which what is forecast never leaves; the support of the first
      ones may lie before it.

    Raises:
      InputError: the city is too short for one, or shows nothing there.
    """
    per_day = city.steps_per_day
    sizes: Any = {"history": data.history, "horizon": data.horizon}
    span = split_source(city.num_steps, name=city.name, **sizes).validation
    length = min(config.test_days * per_day, len(span))
    latest = span.stop - length
    # In a short city, stretches of a day each say more than one that is as long as all there is.
    if latest - span.start < (config.stretches - 1) * length // 2:
        length = min(max(per_day, len(span) // config.stretches), len(span))
        latest = span.stop - length
    data = dataclasses.replace(data, support_days=config.support_days, window_days=None)
    graphs = region_graphs([city], max_neighbours=data.max_neighbours, pick=data.pick_neighbours, seed=0)
    targets = []
    for first in np.unique(np.linspace(span.start, latest, config.stretches).astype(int)):
        test = Span(int(first), int(first) + length)
        known: Any = {"history": data.history, "before": "its last 20 %", "name": city.name}
        split = split_before(test, per_day, config.support_days, **known)
        starts = window_starts(city, test, reach_back=True, **sizes)
        seen = np.isfinite(city.values[split.support.start : split.support.stop]).any()
        if len(starts) and seen:
            targets.append(split_city(city, data, split, starts, graphs=graphs))
    if not targets:
        raise InputError(f"city {city.name!r} shows nothing in its last 20 %; leave it out")
    return targets


def measure_room(
    city: City, hypernetwork: Hypernetwork, own: OwnParameters, *, key: Key, config: RoomConfig = RoomConfig()
) -> dict[str, Any]:
    """Errors of a generator in a city that it never saw, between its pooled model and the city's own parameters.

    Args:
      city: one channel, at the generator's interval.
      hypernetwork: of other cities.
      own: of `own_parameters`, from the generator's pooled model.
      key: random key of the draws.
      config: days, stretches, draws and fine-tuning.

    Returns:
      JSON values: `error`, the mean absolute error of each of `METHODS` in data units; `room`, how far the better of
      `city` and `own` lies below the pooled model, as a part of its error; `share`, by method what part of the room is
      reached, None where it is below `LEAST_ROOM`; `stretches`, the errors in each; `regions`; and `readings`, how many
      were forecast.

    Raises:
      InputError: see `held_out_targets`.
    """
    refuse_paper(hypernetwork.data)
    targets = held_out_targets(city, hypernetwork.data, config)
    found = [stretch_sums(city, hypernetwork, target, own, key=key, config=config) for target in targets]
    sums, readings = np.array([[sums[name] for name in METHODS] for sums, _ in found]), [count for _, count in found]
    errors = sums / np.array(readings)[:, None]
    total = dict(zip(METHODS, (sums.sum(axis=0) / sum(readings)).tolist(), strict=True))
    room = total["pooled"] - min(total["city"], total["own"])
    some = room > LEAST_ROOM * total["pooled"]
    shares = {name: (total["pooled"] - total[name]) / room if some else None for name in METHODS[2:]}
    return {
        "city": city.name,
        "unit": city.unit,
        "regions": city.num_nodes,
        "readings": sum(readings),
        "error": total,
        "room": room / total["pooled"],
        "share": shares,
        "stretches": [dict(zip(METHODS, row.tolist(), strict=True)) for row in errors],
    }


def stretch_sums(
    city: City,
    hypernetwork: Hypernetwork,
    target: Target,
    own: OwnParameters | None = None,
    *,
    key: Key,
    config: RoomConfig = RoomConfig(),
) -> tuple[dict[str, float], int]:
    """Errors in one stretch of a city that the generator never saw.

    Args:
      city: one channel, at the generator's interval.
      hypernetwork: of other cities.
      target: one of `held_out_targets`.
      own: the city's own parameters, from the generator's pooled model; without them `city` and `own` are left out.
      key: random key of the draws.
      config: draws and fine-tuning.

    Returns:
      Sums of absolute errors (data units) of each of `METHODS`, and the number of readings that were forecast.
    """
    model, data = hypernetwork.model, hypernetwork.data
    prompts = region_prompts(city, [target.split.support], hypernetwork.prompt_encoder)
    draw_key, adapt_key, shuffle_key = jax.random.split(key, 3)
    order = shuffle(np.zeros(city.num_nodes, int), key=shuffle_key)
    generated, shuffled = (
        hypernetwork.generate(of, key=draw_key, config=config.generate, any_kind=True).params
        for of in (prompts, dataclasses.replace(prompts, values=prompts.values[:, order]))
    )
    pooled = broadcast_regions(hypernetwork.pooled, city.num_nodes)
    starts = np.asarray(target.test_starts)
    tune: Any = {"key": adapt_key, "directions": hypernetwork.directions}
    draw: Any = {"generate": config.generate, "config": config.posterior, "adapt": config.adapt, "key": draw_key}
    found = {
        "historical_average": historical_average(
            city, target.split.support, starts, history=data.history, horizon=data.horizon
        ),
        "pooled": zero_shot(model, target, pooled).forecast,
        "generated": zero_shot(model, target, generated).forecast,
        "generated_shuffled": zero_shot(model, target, shuffled).forecast,
        "pooled_adapted": few_shot(model, target, pooled, config.adapt, **tune).forecast,
        "generated_adapted": few_shot(model, target, generated, config.adapt, **tune).forecast,
        "generated_posterior": posterior_shot(hypernetwork, target, prompts, generated, **draw).forecast,
    }
    if own is not None:
        # Own anomalies last as long as they say: damping is for models of other cities.
        undamped = dataclasses.replace(target, damping=(1.0, 1.0))
        found["city"] = zero_shot(model, undamped, own.city).forecast
        found["own"] = zero_shot(model, undamped, own.own).forecast
    truth = observed_truth(city, target)[0]
    read = np.isfinite(truth)
    sums = {name: float(np.abs(forecast - truth)[read].sum(dtype=np.float64)) for name, forecast in found.items()}
    return sums, int(read.sum())
