"""In: source regions and a pooled model. Out: parameters from which a few steps on a new city's days lead far.

Model-agnostic meta-learning (Finn et al., "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", arXiv
1703.03400), as ST-GFSL (Lu et al., "Spatio-Temporal Graph Few-Shot Learning with Cross-City Knowledge Transfer", arXiv
2205.13947) has it between cities: a task is a city and some of its days. What is learned is one vector for all regions
of a city, and the steps move it for all of them together.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from gpdiff_jax.data.sources import Sources
from gpdiff_jax.data.target import Target
from gpdiff_jax.data.windows import choose_variants, gather_draw, reserved_steps
from gpdiff_jax.errors import InputError, check_above_zero, named
from gpdiff_jax.models.loss import batch_forecast, huber_sums
from gpdiff_jax.models.protocol import Model, Window, model_text
from gpdiff_jax.training.loop import train
from gpdiff_jax.training.optimisers import clipped_adam
from gpdiff_jax.training.parallel import training_devices
from gpdiff_jax.training.step import LossTerm, Part, make_step, start_training
from gpdiff_jax.transfer.shared import add_to_all, city_update
from gpdiff_jax.typing import Device, Key, Params, RegionGraph
from gpdiff_jax.zoo.pooled import PooledConfig


@dataclasses.dataclass(frozen=True)
class MetaConfig:
    """Steps of Adam from the pooled model, each of `episodes` tasks; and the plain steps within a task, and later.

    The rates are those that erred least in four cities that are no targets of ours (docs/experiments.md, section 39),
    when steps within a task were not yet clipped.
    """

    steps: int = 250
    episodes: int = 4
    regions: int = 16  # of a task, anew in every step within it
    windows: int = 8  # of each
    learning_rate: float = 3e-3
    inner_steps: int = 5
    inner_rate: float = 0.1

    def __post_init__(self) -> None:
        check_above_zero(named(self))

    @classmethod
    def beside(cls, pooled: PooledConfig) -> "MetaConfig":
        """What costs about as much as the pooled model's training: an eighth of its steps."""
        return cls(steps=max(1, pooled.steps // 8))


def meta_learn(
    model: Model,
    sources: Sources,
    pooled: Params,
    config: MetaConfig,
    *,
    key: Key,
    devices: Sequence[Device] | None = None,
    checkpoints: pathlib.Path | None = None,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> Params:
    """Learns parameters that a few steps on the days of a city suit to it.

    A task is a random source city and one of its variants, the days that one sees. Clipped gradient steps on windows
    of these days, each seen through another variant, as support windows are seen through other days, lead to parameters
    whose error on windows of days near them (`DataConfig.near_days`), seen through these, is minimised: with its
    derivative through the steps.

    Args:
      model: the forecaster.
      sources: the source regions.
      pooled: the pooled model, where it starts.
      config: steps and sizes.
      key: random key.
      devices: see `parallel.training_devices`; they share the tasks of a step.
      checkpoints: see `loop.train`.
      progress: called with (steps done, metrics) ten times.

    Returns:
      The parameters after the last step, one vector.

    Raises:
      InputError: the sources have one variant, so that nothing else is seen of a task's days.
      NotFiniteError: a loss or its gradient is not finite; names the step.
    """
    if sources.config.variants < 2:
        raise InputError(f"`variants` (={sources.config.variants}) must be at least 2 for a meta-learned model")
    devices = training_devices(config.episodes, devices)
    optimiser = clipped_adam(optax.cosine_decay_schedule(config.learning_rate, config.steps, alpha=0.02))
    step = make_step(
        [LossTerm("train_loss", partial(_sums, model, config), config.episodes)], optimiser, num_devices=len(devices)
    )
    return train(
        step,
        start_training(jax.device_put(pooled), optimiser),
        sources,
        key=key,
        steps=config.steps,
        evaluate_every=-(-config.steps // 10),
        devices=devices,
        name="meta-learned model",
        checkpoints=checkpoints,
        settings=(model.name, checkpoints and model_text(model, sources.sizes, pooled), config, "clipped"),
        progress=progress,
    ).params


def adapt_meta_learned(model: Model, target: Target, params: Params, config: MetaConfig, *, key: Key) -> Params:
    """Moves meta-learned parameters by as many steps as they were learned for, on the support windows of a target.

    The steps are those of `city_update`, clipped as in training: of more regions and windows.

    Args:
      model: the forecaster.
      target: the city.
      params: leaves [K, R, ...].
      config: with which they were learned.
      key: random key of the regions.

    Returns:
      Parameters, leaves [K, R, ...].
    """
    update = city_update(model, target, params, steps=config.inner_steps, rate=config.inner_rate, plain=True, key=key)
    return add_to_all(params, update)


def _sums(
    model: Model, config: MetaConfig, params: Params, sources: Sources, part: Part, key: Key
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Errors of the tasks of a part after their steps, and the number of readings."""
    keys = jax.random.split(key, config.episodes)[part.numbers]
    totals, counts = jax.lax.map(partial(_task, model, config, params, sources), keys)
    return totals.sum(), counts.sum(), {}


def _task(model: Model, config: MetaConfig, params: Params, sources: Sources, key: Key) -> tuple[jax.Array, jax.Array]:
    city_key, variant_key, inner_key, query_key = jax.random.split(key, 4)
    city = jax.random.randint(city_key, (), 0, len(sources.cities))
    variant = jax.random.randint(variant_key, (), 0, sources.bank.mean.shape[0], dtype=jnp.int32)
    odds = jnp.where(sources.city_index == city, 0.0, -1e9)

    def sums(params: Params, key: Key, draw: Callable[[RegionGraph, Key], Window]) -> tuple[jax.Array, jax.Array]:
        region_key, window_key = jax.random.split(key)
        drawn = jax.random.categorical(region_key, odds, shape=(config.regions,))
        graphs = jax.tree.map(lambda leaf: leaf[drawn], sources.graphs)
        windows = jax.vmap(draw)(graphs, jax.random.split(window_key, config.regions))
        forecast = jax.vmap(partial(batch_forecast, model), in_axes=(None, 0, 0))(params, graphs, windows)
        return huber_sums(forecast, windows.target, windows.mask)

    def visible(graph: RegionGraph, key: Key) -> Window:
        return _windows_within(sources, graph, variant, config.windows, key=key)

    def others(graph: RegionGraph, key: Key) -> Window:
        return _windows_beside(sources, graph, variant, config.windows, key=key)

    def loss(params: Params, key: Key) -> Float[Array, ""]:
        total, count = sums(params, key, visible)
        return total / jnp.maximum(count, 1.0)

    def descend(params: Params, key: Key) -> tuple[Params, None]:
        return _step(params, jax.grad(loss)(params, key), config.inner_rate), None

    adapted, _ = jax.lax.scan(descend, params, jax.random.split(inner_key, config.inner_steps))
    return sums(adapted, query_key, others)


def _step(params: Params, grads: Params, rate: float) -> Params:
    """A step of `clipped_descent` that has a derivative, also of a gradient of zero, whose length has none."""
    shorter = jax.lax.rsqrt(jnp.maximum(optax.tree.norm(grads, squared=True), 1.0))
    return jax.tree.map(lambda leaf, grad: leaf - rate * shorter * grad, params, grads)


def _windows_within(sources: Sources, graph: RegionGraph, variant: Int[Array, ""], count: int, *, key: Key) -> Window:
    """Windows of a region within the days of a variant, each seen through another variant."""
    bank, table, centre = sources.bank, sources.train, graph.nodes[0]
    start_key, variant_key = jax.random.split(key)
    begin, end = table.spans[variant, centre, 0], table.spans[variant, centre, 1]
    last = jnp.maximum(end - bank.history - bank.horizon, begin)
    starts = jax.random.randint(start_key, (count,), begin, last + 1, dtype=jnp.int32)
    return gather_draw(bank, graph.nodes, choose_variants(bank, table, centre, starts, key=variant_key))


def _windows_beside(sources: Sources, graph: RegionGraph, variant: Int[Array, ""], count: int, *, key: Key) -> Window:
    """Windows of a region on other days than a variant's, near them at the usual odds, seen through the variant."""
    bank, table, centre = sources.bank, sources.train, graph.nodes[0]
    start_key, choice_key = jax.random.split(key)
    drawn = jax.random.randint(start_key, (_CANDIDATES * count,), 0, table.count[centre], dtype=jnp.int32)
    starts = table.starts[table.first[centre] + drawn]
    low, high = reserved_steps(starts, table.first_slot[centre], bank.history, bank.horizon, table.steps_per_day)
    begin, end = table.spans[variant, centre, 0], table.spans[variant, centre, 1]
    gap = jnp.maximum(begin - high, low - end)
    rate = 1.0 / (table.near_days * table.steps_per_day) if table.near_days else 0.0
    odds = jnp.where(gap >= 0, -rate * gap.astype(jnp.float32), -1e9)
    chosen = starts[jax.random.categorical(choice_key, odds, shape=(count,))]
    return gather_draw(bank, graph.nodes, choose_variants(bank, table, centre, chosen, key=key, variant=variant))


_CANDIDATES = 16  # that each window is chosen from
