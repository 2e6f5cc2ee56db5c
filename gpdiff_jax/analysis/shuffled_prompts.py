"""In: a generator and prompts. Out: the error of what it generates, from a region's own prompt and from another's.

A generator that uses its prompt must lose when prompts are shuffled. Forecasts of the samples are averaged. The noise
that parameters are drawn from stays with the region, so the prompt is all that changes.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gpdiff_jax.data.sources import Sources, city_weights
from gpdiff_jax.data.target import Target
from gpdiff_jax.data.target_windows import gather_target
from gpdiff_jax.data.windows import gather_source
from gpdiff_jax.errors import InputError
from gpdiff_jax.hypernetwork import GenerateConfig, Hypernetwork
from gpdiff_jax.models.loss import batch_forecast
from gpdiff_jax.models.protocol import Model, Window
from gpdiff_jax.pretraining import best_tokens
from gpdiff_jax.prompts.prompt import Prompts
from gpdiff_jax.typing import Key, Params, RegionGraph
from gpdiff_jax.zoo.parameter_zoo import ParameterZoo
from gpdiff_jax.zoo.tokens import from_tokens

Errors = Float[np.ndarray, "X 3"]
"""Of every region: sums of absolute errors and of deviations over the samples, and the number of readings."""


def source_response(
    zoo: ParameterZoo,
    hypernetwork: Hypernetwork,
    rows: Int[np.ndarray, " X"],
    config: GenerateConfig,
    shuffles: int,
    variants: int,
    *,
    draw_key: Key,
    shuffle_key: Key,
) -> dict[str, float | None]:
    """Errors of generated parameters on the validation windows of source regions, in deviations of the region.

    A region is seen through the first `variants` of its random windows in turn: prompt, scale and profile come from the
    same one. Every city weighs the same.

    Args:
      zoo: with the sources attached.
      hypernetwork: the generator.
      rows: the regions, of all that the zoo has.
      config: how parameters are drawn.
      shuffles: how often prompts are shuffled.
      variants: how many of the random windows.
      draw_key: key of the draws.
      shuffle_key: key of the shuffles.

    Returns:
      `error`, `spread` (deviation of the forecasts over the samples), `shuffled` and `rise` (per cent, with
      `rise_deviation` over the shuffles) with the prompts of other regions of the same city, the same three as
      `..._across` with those of any other region, `pooled` of the pooled model, `harvested` of the region's own vector.
      Where nothing was observed, all are None.
    """
    sources = zoo.sources
    if sources is None:
        raise InputError("the zoo has no sources attached; load it with `load_zoo(folder, sources)`")
    city, ids = zoo.city_index[rows], zoo.prompts.region_ids[jnp.asarray(rows)]
    weights = city_weights(city)
    used = range(min(variants, zoo.prompts.values.shape[0]))

    def measure(params_of: Callable[[int], Params]) -> tuple[float, float]:
        errors = [
            _source_errors(hypernetwork.model, sources, params_of(v), jnp.asarray(rows), _number(v)) for v in used
        ]
        # A variant may hide every validation window of a region.
        sums = np.sum([np.asarray(part, np.float64) for part in errors], axis=0)
        means = sums[:, :2] / np.maximum(sums[:, 2:], 1.0)
        share = weights * (sums[:, 2] > 0)
        error, spread = share @ means / share.sum() if share.any() else (np.nan, np.nan)
        return float(error), float(spread)

    def error_of_order(order: np.ndarray) -> tuple[float, float]:
        def params_of(variant: int) -> Params:
            values = zoo.prompts.values[variant, jnp.asarray(order[rows])][None]
            shuffled = Prompts(values, ids, zoo.prompts.names)
            return hypernetwork.generate(shuffled, key=draw_key, config=config).params

        return measure(params_of)

    everyone = np.arange(zoo.num_regions)
    error, spread = error_of_order(everyone)
    layout = hypernetwork.codec.layout
    own = jnp.asarray(best_tokens(zoo, layout)[rows])
    harvested = _repeated(jax.vmap(partial(from_tokens, layout))(own), config.samples)
    pooled = _repeated(_everywhere(hypernetwork.pooled, len(rows)), config.samples)
    found: dict[str, float | None] = {
        "error": error,
        "spread": spread if config.samples > 1 else None,
        "pooled": measure(lambda _: pooled)[0],
        "harvested": measure(lambda _: harvested)[0],
    }
    for suffix, groups in (("", zoo.city_index), ("_across", np.zeros(zoo.num_regions, int))):
        orders = [shuffle(groups, key=jax.random.fold_in(shuffle_key, number)) for number in range(shuffles)]
        found |= _rise([error_of_order(order)[0] for order in orders], error, suffix)
    return _measured(found)


def target_response(
    hypernetwork: Hypernetwork,
    target: Target,
    prompts: Prompts,
    config: GenerateConfig,
    shuffles: int,
    *,
    draw_key: Key,
    shuffle_key: Key,
) -> dict[str, float | None]:
    """Errors of generated parameters on the support days of a target, in its own unit; its test span is not read.

    Args:
      hypernetwork: the generator.
      target: its windows.
      prompts: of its regions.
      config: how parameters are drawn.
      shuffles: how often prompts are shuffled.
      draw_key: key of the draws.
      shuffle_key: key of the shuffles.

    Returns:
      `error`, `spread`, `shuffled`, `rise`, `rise_deviation` and `pooled` as of `source_response`; None where the
      support days hold no whole window.
    """
    if len(target.support_starts) == 0:
        return dict.fromkeys(("error", "spread", "pooled", "shuffled", "rise", "rise_deviation"))

    def measure(params: Params) -> tuple[float, float]:
        sums = np.asarray(_target_errors(hypernetwork.model, target, params), np.float64).sum(axis=0)
        return (float(sums[0] / sums[2]), float(sums[1] / sums[2])) if sums[2] else (np.nan, np.nan)

    def error_of_order(order: np.ndarray) -> tuple[float, float]:
        shuffled = dataclasses.replace(prompts, values=prompts.values[:, jnp.asarray(order)])
        return measure(hypernetwork.generate(shuffled, key=draw_key, config=config).params)

    regions = target.num_regions
    error, spread = error_of_order(np.arange(regions))
    orders = [shuffle(np.zeros(regions, int), key=jax.random.fold_in(shuffle_key, k)) for k in range(shuffles)]
    found: dict[str, float | None] = {"error": error, "spread": spread if config.samples > 1 else None}
    found["pooled"] = measure(_repeated(_everywhere(hypernetwork.pooled, regions), config.samples))[0]
    return _measured(found | _rise([error_of_order(order)[0] for order in orders], error, ""))


def _measured(found: dict[str, float | None]) -> dict[str, float | None]:
    """The same with None for what nobody observed."""
    return {name: None if value is None or np.isnan(value) else value for name, value in found.items()}


def shuffle(groups: Int[np.ndarray, " R"], *, key: Key) -> Int[np.ndarray, " R"]:
    """A random order in which every region gets the place of another one of its group; one that is alone keeps its own.

    Args:
      groups: [R], what must stay together.
      key: random key.

    Returns:
      A permutation of the numbers from 0 to R - 1.
    """
    order = np.arange(len(groups))
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        mixed = rows[np.asarray(jax.random.permutation(jax.random.fold_in(key, int(group)), len(rows)))]
        order[mixed] = np.roll(mixed, 1)
    return order


def _rise(shuffled: list[float], error: float, suffix: str) -> dict[str, float | None]:
    """The mean error with shuffled prompts, and by how many per cent it is above the error with the own ones."""
    if not error > 0:  # nothing was observed
        return dict.fromkeys((f"shuffled{suffix}", f"rise{suffix}", f"rise_deviation{suffix}"))
    rises = 100.0 * (np.asarray(shuffled) / error - 1.0)
    deviation = float(rises.std(ddof=1)) if len(rises) > 1 else None
    return {
        f"shuffled{suffix}": float(np.mean(shuffled)),
        f"rise{suffix}": float(rises.mean()),
        f"rise_deviation{suffix}": deviation,
    }


def _everywhere(params: Params, regions: int) -> Params:
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (regions, *leaf.shape)), params)


def _repeated(params: Params, samples: int) -> Params:
    """The same for every sample: a few forecasts too many cost less than another compilation."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (samples, *leaf.shape)), params)


def _number(value: int) -> jax.Array:
    return jnp.asarray(value, jnp.int32)


@partial(jax.jit, static_argnames="model")
def _source_errors(
    model: Model, sources: Sources, params: Params, rows: Int[Array, " X"], variant: Int[Array, ""]
) -> Float[Array, "X 3"]:
    def one(row: tuple) -> jax.Array:
        samples, region = row
        # Which windows are looked at is fixed; the key would only choose a variant.
        windows = gather_source(
            sources.bank,
            sources.train,
            region.graph.nodes,
            region.validation_starts,
            key=jax.random.key(0),
            variant=variant,
        )
        return _errors(model, samples, region.graph, windows)

    regions = jax.tree.map(lambda leaf: leaf[rows], sources.regions)
    return jax.lax.map(one, (_by_region(params), regions))


@partial(jax.jit, static_argnames="model")
def _target_errors(model: Model, target: Target, params: Params) -> Float[Array, "R 3"]:
    def one(row: tuple) -> jax.Array:
        samples, graph = row
        windows = gather_target(
            target.bank, graph.nodes, target.support_starts, target.support_start, target.steps_per_day
        )
        scale = target.bank.std[-1, graph.nodes[0]]
        return _errors(model, samples, graph, windows) * jnp.stack([scale, scale, jnp.ones_like(scale)])

    return jax.lax.map(one, (_by_region(params), target.graphs))


def _by_region(params: Params) -> Params:
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), params)


def _errors(model: Model, samples: Params, graph: RegionGraph, windows: Window) -> Float[Array, "3"]:
    """Of one region with K parameter vectors: see `Errors`."""
    forecasts = jax.lax.map(lambda params: batch_forecast(model, params, graph, windows), samples)
    absolute = jnp.abs(forecasts.mean(axis=0) - windows.target) * windows.mask
    deviation = forecasts.std(axis=0) * windows.mask
    return jnp.stack([absolute.sum(), deviation.sum(), windows.mask.sum()])
