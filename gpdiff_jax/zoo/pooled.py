"""In: source regions and a model. Out: the pooled model, one parameter vector trained on all of them together."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from gpdiff_jax.data.series import SeriesBank
from gpdiff_jax.data.sources import SourceRegion, Sources, city_weights
from gpdiff_jax.data.windows import StartTable, draw_windows, gather_source, mix_windows
from gpdiff_jax.errors import InputError, check_above_zero, named
from gpdiff_jax.models.loss import batch_forecast, huber_sums, masked_absolute
from gpdiff_jax.models.protocol import Model, ModelSizes, Window, model_text
from gpdiff_jax.training.loop import VALIDATION, steps_between_evaluations, train
from gpdiff_jax.training.optimisers import clipped_adam
from gpdiff_jax.training.parallel import DEVICES, training_devices
from gpdiff_jax.training.step import LossTerm, Part, TrainState, make_step, start_training
from gpdiff_jax.typing import Device, Key, Params, RegionGraph
from gpdiff_jax.zoo.tokens import make_layout


@dataclasses.dataclass(frozen=True)
class PooledConfig:
    """How the pooled model is trained: `regions` x `windows` windows a step, best validation kept.

    With `averaging` above 0 the learning rate stays as it is, and what is evaluated and kept is a running average of
    the parameters over about 1 / (1 - `averaging`) steps, or the last ninth of all where these are fewer, as means of
    weights suit cities better that were not trained on (Izmailov et al., arXiv 1803.05407; Cha et al., arXiv
    2102.08604). 0 keeps none, and the rate falls along a cosine. With `mixing` above 0 the windows of a region are
    mixed with those of the next one of the step, often of another city: see `mix_windows`; the smaller share of the two
    is that of a draw from Beta(`mixing`, `mixing`). None goes by the covariates (`with_covariates`): averages of .995
    and mixing of .2 with the calendar alone, where both were found to help in cities that are left out, and neither
    with others (docs/experiments.md, section 48).
    """

    steps: int = 2000
    regions: int = 64
    windows: int = 8
    learning_rate: float = 2e-3
    evaluations: int = 20
    averaging: float | None = None
    mixing: float | None = None

    def __post_init__(self) -> None:
        check_above_zero(named(self, "steps", "regions", "windows", "learning_rate", "evaluations"))
        if self.averaging is not None and not 0 <= self.averaging < 1:
            raise InputError(f"`averaging` of the pooled model must be in [0, 1), got {self.averaging}")
        if self.mixing and not 1e-6 <= self.mixing <= 1e6:
            raise InputError(f"`mixing` must be 0, or from 1e-6 to 1e6, got {self.mixing}")

    def with_covariates(self, covariates: str) -> "PooledConfig":
        """The configuration with numbers for None, where windows have these covariates."""
        averaging, mixing = (0.995, 0.2) if covariates == "calendar" else (0.0, 0.0)
        return dataclasses.replace(
            self,
            averaging=averaging if self.averaging is None else self.averaging,
            mixing=mixing if self.mixing is None else self.mixing,
        )


def validation_error(
    model: Model, params: Params, bank: SeriesBank, table: StartTable, region: SourceRegion
) -> Float[Array, ""]:
    """Mean absolute error of one region's parameters on its validation windows, scaled; NaN without a reading there."""
    windows = validation_windows(bank, table, region)
    return masked_absolute(batch_forecast(model, params, region.graph, windows), windows.target, windows.mask)


def validation_windows(bank: SeriesBank, table: StartTable, region: SourceRegion) -> Window:
    """The validation windows of one region, stacked; every evaluation sees the same, through the same variants."""
    key = jax.random.fold_in(jax.random.key(0), region.region_id)
    return gather_source(bank, table, region.graph.nodes, region.validation_starts, key=key)


def initial_params(model: Model, graphs: jraph.GraphsTuple, sizes: ModelSizes, *, key: Key) -> Params:
    """Random parameters of one region's forecaster.

    Args:
      model: the forecaster.
      graphs: stacked region graphs; the first one gives the shapes.
      sizes: H, P, I, F.
      key: random key.

    Returns:
      A parameter pytree.

    Raises:
      InputError: tokens cannot hold it; see `tokens.make_layout`.
    """
    params = _initial_params(model, sizes, graphs, key)
    make_layout(params)
    return params


# Compiled as a whole: run one operation after another, it is more than a hundred programs.
@partial(jax.jit, static_argnums=(0, 1))
def _initial_params(model: Model, sizes: ModelSizes, graphs: RegionGraph, key: Key) -> Params:
    history, horizon, inputs, covariates, _ = sizes
    graph = jax.tree.map(lambda leaf: leaf[0], graphs)
    zeros = (jnp.zeros((graph.nodes.shape[0], history, inputs)), jnp.zeros((history + horizon, covariates)))
    return model.init(key, graph, *zeros)


def broadcast_regions(params: Params, regions: int) -> Params:
    """One vector as the start of every region: leaves [1, R, ...], on the host."""
    return jax.tree.map(lambda leaf: np.broadcast_to(leaf, (1, regions, *leaf.shape)), params)


def shrink_towards(pooled: Params, params: Params, kept: float) -> Params:
    """Parameters moved towards one vector.

    Args:
      pooled: the vector.
      params: leaves of the same names with leading axes more, e.g. [K, R, ...].
      kept: the part of their difference from `pooled` that is kept, 0 to 1.

    Returns:
      Parameters like `params`, on the host.
    """
    return jax.tree.map(
        lambda centre, leaf: np.asarray(centre) + np.float32(kept) * (np.asarray(leaf) - np.asarray(centre)),
        pooled,
        params,
    )


class PooledData(NamedTuple):
    """What every step of training the pooled model reads."""

    sources: Sources
    probabilities: Float[Array, "*devices R"]  # how often a region is drawn, and how much it counts in the validation


def train_pooled(
    model: Model,
    sources: Sources,
    config: PooledConfig,
    *,
    key: Key,
    start: Params | None = None,
    devices: Sequence[Device] | None = None,
    checkpoints: pathlib.Path | None = None,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> Params:
    """Trains one model on the regions of all source cities together, every city with equal weight.

    Args:
      model: the forecaster.
      sources: the source regions.
      config: steps and sizes; None of `averaging` and `mixing` goes by the covariates of the sources.
      key: random key.
      start: parameters to begin with, as a model of other cities; random ones if not given.
      devices: see `parallel.training_devices`; they share the regions of a step.
      checkpoints: see `loop.train`.
      progress: called with (steps done, metrics) after every evaluation.

    Returns:
      The parameters with the best validation error, averaged over cities.

    Raises:
      NotFiniteError: a loss, its gradient or a validation error is not finite; names the step.
    """
    config = config.with_covariates(sources.config.covariates)
    init_key, train_key = jax.random.split(key)
    devices = training_devices(config.regions, devices)
    falling = optax.cosine_decay_schedule(config.learning_rate, config.steps, alpha=0.02)
    optimiser = clipped_adam(config.learning_rate if config.averaging else falling)
    params = initial_params(model, sources.graphs, sources.sizes, key=init_key) if start is None else start
    probabilities = city_weights(np.asarray(sources.city_index)).astype(np.float32)
    return train(
        make_pooled_step(model, optimiser, config, len(devices)),
        start_training(params, optimiser, averaged=bool(config.averaging)),
        PooledData(sources, jax.device_put(probabilities)),
        key=train_key,
        steps=config.steps,
        evaluate_every=steps_between_evaluations(config.steps, config.evaluations),
        devices=devices,
        name="pooled model",
        evaluate=_make_evaluate(model, sources.num_regions, len(devices)),
        checkpoints=checkpoints,
        settings=(model.name, checkpoints and model_text(model, sources.sizes, params), config),
        progress=progress,
    ).params


def make_pooled_step(
    model: Model, optimiser: optax.GradientTransformation, config: PooledConfig, num_devices: int
) -> Callable[[TrainState, PooledData, Key], tuple[TrainState, dict[str, jax.Array]]]:
    """One step of training the pooled model, for `loop.train`: `regions` random regions, `windows` windows of each.

    Args:
      model: the forecaster.
      optimiser: of the parameters.
      config: regions and windows, averaging and mixing; of the last two, None is none.
      num_devices: that share the regions.

    Returns:
      See `step.make_step`.
    """

    def sums(
        params: Params, data: PooledData, part: Part, key: Key
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        sources = data.sources
        region_key, window_key, mix_key = jax.random.split(key, 3)
        drawn = jax.random.categorical(region_key, jnp.log(data.probabilities), shape=(config.regions,))
        keys = jax.random.split(window_key, config.regions)

        def draw(numbers: Int[Array, " X"]) -> tuple[RegionGraph, Window]:
            graphs = jax.tree.map(lambda leaf: leaf[drawn[numbers]], sources.graphs)
            of_region = partial(draw_windows, sources.bank, sources.train)
            return graphs, jax.vmap(lambda graph, own: of_region(graph.nodes, config.windows, key=own))(
                graphs, keys[numbers]
            )

        graphs, windows = draw(part.numbers)
        if config.mixing:
            share = jax.random.beta(mix_key, config.mixing, config.mixing, (config.regions,))[part.numbers]
            # The regions of a step are drawn independently, so that the next one is any.
            others = draw((part.numbers + 1) % config.regions)[1]
            windows = mix_windows(windows, others, jnp.maximum(share, 1.0 - share))
        forecast = jax.vmap(partial(batch_forecast, model), in_axes=(None, 0, 0))(params, graphs, windows)
        return *huber_sums(forecast, windows.target, windows.mask), {}

    terms = [LossTerm("train_loss", sums, config.regions)]
    return make_step(terms, optimiser, num_devices=num_devices, averaging=config.averaging or 0.0)


def _make_evaluate(
    model: Model, num_regions: int, num_devices: int
) -> Callable[[Params, PooledData, Key], dict[str, jax.Array]]:
    """The validation error, every city with the same weight; the devices share the regions."""
    share = -(-num_regions // num_devices)

    def evaluate(params: Params, data: PooledData, key: Key) -> dict[str, jax.Array]:
        del key
        sources = data.sources
        mine = share * jax.lax.axis_index(DEVICES) + jnp.arange(share, dtype=jnp.int32)
        rows = jnp.minimum(mine, num_regions - 1)
        regions = jax.tree.map(lambda leaf: leaf[rows], sources.regions)
        errors = jax.lax.map(partial(validation_error, model, params, sources.bank, sources.train), regions)
        # A region without a reading in its validation windows has no error, and no weight.
        known = (mine < num_regions) & sources.validated[rows]
        weights = jnp.where(known, data.probabilities[rows], 0.0).astype(errors.dtype)
        sums = jnp.where(known, errors, 0.0) * weights
        total, weight = jax.lax.psum((sums.sum(), weights.sum()), DEVICES)
        return {VALIDATION: total / weight}

    return evaluate
