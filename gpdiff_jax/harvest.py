"""In: source cities and a model. Out: the parameter zoo, a few vectors per region, each grown from one pooled base.

The region axis is added here, by `lax.map` over compiled per-region training.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from gpdiff_jax.base import BaseConfig, initial_params, train_base, validation_error
from gpdiff_jax.cities.city import City
from gpdiff_jax.cities.windows import draw_unseen, draw_windows
from gpdiff_jax.errors import InputError
from gpdiff_jax.models.loss import anchor_loss, batch_forecast, masked_huber
from gpdiff_jax.models.protocol import Model, make_model
from gpdiff_jax.optimisers import clipped_adam
from gpdiff_jax.sources import DataConfig, Sources, prepare_sources
from gpdiff_jax.typing import Key, Params
from gpdiff_jax.zoo import ParameterZoo

INITS = ("pooled", "shared", "random")


@dataclasses.dataclass(frozen=True)
class HarvestConfig:
    """How the regions are trained, one by one.

    `init` says where a region starts: "pooled" the base trained on all regions, "shared" one random draw for all,
    "random" a draw of its own. `regions_per_batch` regions are trained side by side: 1 suits a CPU's cache, many an
    accelerator. A region stops after `patience` evaluations without a better validation error and keeps its best
    `snapshots`. What is evaluated and kept is a running average of the parameters over about 1 / (1 - `averaging`)
    steps. Where a city shows no weekend at all (or no weekday), `anchor_windows` windows a step hold the region to what
    its start says of such days, which its own readings would let drift; 0 lets it. That takes profile covariates:
    without them the start knows nothing of the region that is worth holding to.
    """

    init: str = "pooled"
    steps: int = 240
    windows: int = 32
    learning_rate: float = 1e-3
    evaluate_every: int = 40
    patience: int = 2
    snapshots: int = 3
    averaging: float = 0.97
    anchor_windows: int = 8
    regions_per_batch: int = 1

    def __post_init__(self) -> None:
        if self.init not in INITS:
            raise InputError(f"`init` must be one of {', '.join(INITS)}, got {self.init!r}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("init", "anchor_windows") and value <= 0:
                raise InputError(f"`{field.name}` must be above 0, got {value}")
        if not self.averaging < 1:
            raise InputError(f"`averaging` must be below 1, got {self.averaging}")
        if self.steps % self.evaluate_every or self.steps < self.snapshots * self.evaluate_every:
            raise InputError(
                f"the steps of a region (={self.steps}) must be a multiple of {self.evaluate_every}, after which each "
                f"snapshot is taken, and at least {self.snapshots * self.evaluate_every} for {self.snapshots} snapshots"
            )


class HarvestedRegion(NamedTuple):
    """The best snapshots of one region, best first; stacked on a leading axis R for many."""

    params: Params  # [S, ...]
    validation_mae: jax.Array  # float32 [S], scaled
    step: jax.Array  # int32 [S], training steps behind the snapshot
    start_mae: jax.Array  # float32 [], the validation error of where it started


def make_region_trainer(
    model: Model, sources: Sources, config: HarvestConfig, *, key: Key
) -> Callable[[Params, Int[Array, ""]], HarvestedRegion]:
    """Makes the pure function that trains one region.

    Args:
      model: the forecaster.
      sources: the source regions.
      config: steps and sizes.
      key: the harvest's key; a region's own is folded in from its stable id, so its result depends on nothing else.

    Returns:
      `train(start, region) -> HarvestedRegion`.
    """
    optimiser = clipped_adam(config.learning_rate)

    def train(start: Params, region: Int[Array, ""]) -> HarvestedRegion:
        graph = jax.tree.map(lambda leaf: leaf[region], sources.graphs)
        region_key = jax.random.fold_in(key, sources.region_ids[region])

        def loss_fn(params: Params, key: Key) -> jax.Array:
            data_key, unseen_key = jax.random.split(key)
            windows = draw_windows(sources.bank, sources.train, graph.nodes, config.windows, key=data_key)
            loss = masked_huber(batch_forecast(model, params, graph, windows), windows.target, windows.mask)
            if not config.anchor_windows or not sources.bank.has_profile:
                return loss
            unseen = draw_unseen(sources.bank, sources.train, graph.nodes, config.anchor_windows, key=unseen_key)
            return loss + anchor_loss(model, params, start, graph, unseen)

        def update(carry: tuple, index: jax.Array) -> tuple:
            params, average, opt_state = carry
            grads = jax.grad(loss_fn)(params, jax.random.fold_in(region_key, index))
            updates, opt_state = optimiser.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            # What the last few batches happened to hold is noise to the generator.
            average = optax.incremental_update(params, average, 1.0 - config.averaging)
            return (params, average, opt_state), None

        def unfinished(carry: tuple) -> jax.Array:
            step, stale, *_ = carry
            return (step < config.steps) & ((stale < config.patience) | (kept_so_far(carry) < config.snapshots))

        def kept_so_far(carry: tuple) -> jax.Array:
            return jnp.isfinite(carry[4]).sum()

        def advance(carry: tuple) -> tuple:
            step, stale, training, kept, errors, steps = carry
            indices = step + jnp.arange(config.evaluate_every)
            training, _ = jax.lax.scan(update, training, indices)
            params = training[1]
            step = step + config.evaluate_every
            error = validation_error(model, params, sources, region)
            stale = jnp.where(error < errors.min(), 0, stale + 1)
            worst = jnp.argmax(errors)
            better = error < errors[worst]
            kept = jax.tree.map(lambda all_, new: jnp.where(better, all_.at[worst].set(new), all_), kept, params)
            errors = jnp.where(better, errors.at[worst].set(error), errors)
            steps = jnp.where(better, steps.at[worst].set(step), steps)
            return step, stale, training, kept, errors, steps

        kept = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (config.snapshots, *leaf.shape)), start)
        empty = (jnp.full((config.snapshots,), jnp.inf), jnp.zeros((config.snapshots,), jnp.int32))
        zero = jnp.zeros((), jnp.int32)
        carry = (zero, zero, (start, start, optimiser.init(start)), kept, *empty)
        *_, kept, errors, steps = jax.lax.while_loop(unfinished, advance, carry)
        order = jnp.argsort(errors)
        start_error = validation_error(model, start, sources, region)
        return HarvestedRegion(jax.tree.map(lambda leaf: leaf[order], kept), errors[order], steps[order], start_error)

    return train


def harvest_regions(
    model: Model,
    sources: Sources,
    base: Params,
    config: HarvestConfig,
    *,
    key: Key,
    chunk: int = 32,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> HarvestedRegion:
    """Trains every region on its own, from the start that `config.init` names.

    Args:
      model: the forecaster.
      sources: the source regions.
      base: the pooled base.
      config: steps and sizes.
      key: random key.
      chunk: regions per call of the compiled program; progress is reported after each.
      progress: called with (regions done, metrics).

    Returns:
      The snapshots of all regions on the host, stacked: leaves [R, S, ...].

    Raises:
      FloatingPointError: a region's validation error is not finite; names the region.
    """
    start_key, train_key = jax.random.split(key)

    # Sources, base and keys are arguments: closed over, they would be written into the program as constants.
    @jax.jit
    def train_chunk(
        sources: Sources, base: Params, start_key: Key, train_key: Key, regions: Int[Array, " R"]
    ) -> HarvestedRegion:
        train = make_region_trainer(model, sources, config, key=train_key)

        def start_of(region: Int[Array, ""]) -> Params:
            if config.init == "pooled":
                return base
            own = jax.random.fold_in(start_key, sources.region_ids[region]) if config.init == "random" else start_key
            return initial_params(model, sources.graphs, sources.sizes, key=own)

        return jax.lax.map(lambda r: train(start_of(r), r), regions, batch_size=config.regions_per_batch)

    chunk = min(max(chunk, config.regions_per_batch), sources.num_regions)
    done: list[HarvestedRegion] = []
    for first in range(0, sources.num_regions, chunk):
        # The last chunk is filled up with repeats, so that one compiled program serves all.
        regions = np.minimum(np.arange(first, first + chunk), sources.num_regions - 1)
        real = min(chunk, sources.num_regions - first)
        trained = train_chunk(sources, base, start_key, train_key, jnp.asarray(regions))
        result = jax.tree.map(lambda leaf, n=real: np.asarray(leaf)[:n], trained)
        broken = ~np.isfinite(result.validation_mae).all(axis=1)
        if broken.any():
            name = sources.names[first + int(np.flatnonzero(broken)[0])]
            raise FloatingPointError(f"the validation error of region {name!r} is not finite; lower the learning rate")
        done.append(result)
        if progress:
            metrics = {
                "validation_loss": float(result.validation_mae[:, 0].mean()),
                "base_validation_loss": float(result.start_mae.mean()),
                "steps": float(result.step[:, 0].mean()),
            }
            progress(first + real, metrics)
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *done)


def make_zoo(model: Model, sources: Sources, base: Params, harvested: HarvestedRegion) -> ParameterZoo:
    """Puts the harvested regions beside their prompts."""
    return ParameterZoo(
        model=model.name,
        base=base,
        params=harvested.params,
        validation_mae=np.asarray(harvested.validation_mae),
        start_mae=np.asarray(harvested.start_mae),
        step=np.asarray(harvested.step),
        prompts=sources.prompts,
        names=sources.names,
        city_index=np.asarray(sources.city_index),
        sources=sources,
    )


def harvest(
    cities: Sequence[City],
    *,
    model: str = "stgcn",
    key: Key,
    data: DataConfig = DataConfig(),
    base: BaseConfig = BaseConfig(),
    config: HarvestConfig = HarvestConfig(),
) -> ParameterZoo:
    """Trains the pooled base, then every region's own parameters from it.

    Args:
      cities: one-channel source cities of one interval.
      model: name of a registered model.
      key: random key.
      data: windows, covariates and graphs.
      base: training of the base.
      config: training of the regions.

    Returns:
      The zoo, with the sources attached for `pretrain`.

    Raises:
      InputError: see `prepare_sources` and `make_model`.
      FloatingPointError: a loss is not finite.
    """
    data_key, base_key, region_key = jax.random.split(key, 3)
    sources = prepare_sources(cities, data, key=data_key)
    forecaster = make_model(model, sources.sizes)
    start = train_base(forecaster, sources, base, key=base_key)
    return make_zoo(forecaster, sources, start, harvest_regions(forecaster, sources, start, config, key=region_key))
