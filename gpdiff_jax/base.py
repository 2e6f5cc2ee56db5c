"""In: source regions and a model. Out: the pooled base, one parameter vector trained on all of them together."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import optax
from jaxtyping import Array, Float

from gpdiff_jax.cities.series import SeriesBank
from gpdiff_jax.cities.windows import StartTable, draw_windows, gather_source
from gpdiff_jax.errors import InputError
from gpdiff_jax.models.loss import batch_forecast, masked_absolute, masked_huber
from gpdiff_jax.models.protocol import Model, ModelSizes
from gpdiff_jax.optimisers import clipped_adam
from gpdiff_jax.sources import SourceRegion, Sources
from gpdiff_jax.tokens import make_layout
from gpdiff_jax.typing import Key, Params, RegionGraph


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """How the pooled base is trained: `regions` x `windows` windows a step, cosine decay, best validation kept."""

    steps: int = 2000
    regions: int = 64
    windows: int = 8
    learning_rate: float = 2e-3
    evaluations: int = 20

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) <= 0:
                raise InputError(f"`{field.name}` must be above 0, got {getattr(self, field.name)}")


def validation_error(
    model: Model, params: Params, bank: SeriesBank, table: StartTable, region: SourceRegion
) -> Float[Array, ""]:
    """Mean absolute error of one region's parameters on its validation windows, scaled."""
    # A fixed key: every evaluation of a region sees the same variants.
    key = jax.random.fold_in(jax.random.key(0), region.region_id)
    windows = gather_source(bank, table, region.graph.nodes, region.validation_starts, key=key)
    return masked_absolute(batch_forecast(model, params, region.graph, windows), windows.target, windows.mask)


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
    history, horizon, inputs, covariates = sizes
    graph = jax.tree.map(lambda leaf: leaf[0], graphs)
    zeros = (jnp.zeros((graph.nodes.shape[0], history, inputs)), jnp.zeros((history + horizon, covariates)))
    return model.init(key, graph, *zeros)


def steps_between_evaluations(steps: int, evaluations: int) -> int:
    """The smallest divisor of `steps` that asks for at most so many evaluations."""
    return next(count for count in range(1, steps + 1) if steps % count == 0 and steps <= count * evaluations)


def train_base(
    model: Model,
    sources: Sources,
    config: BaseConfig,
    *,
    key: Key,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> Params:
    """Trains one model on the regions of all source cities together, every city with equal weight.

    Args:
      model: the forecaster.
      sources: the source regions.
      config: steps and sizes.
      key: random key.
      progress: called with (steps done, metrics) after every evaluation.

    Returns:
      The parameters with the best validation error, averaged over cities.

    Raises:
      FloatingPointError: the loss is not finite; names the step.
    """
    init_key, train_key = jax.random.split(key)
    params = initial_params(model, sources.graphs, sources.sizes, key=init_key)
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.steps, alpha=0.02)
    optimiser = clipped_adam(schedule)
    city_counts = jnp.bincount(sources.city_index)
    odds = (1.0 / city_counts.astype(jnp.float32))[sources.city_index]
    steps_per_call = steps_between_evaluations(config.steps, config.evaluations)

    # The sources and the key are arguments: closed over, they would be written into the program as constants.
    def loss_fn(params: Params, sources: Sources, key: Key) -> jax.Array:
        region_key, window_key = jax.random.split(key)
        regions = jax.random.categorical(region_key, jnp.log(odds), shape=(config.regions,))
        graphs = jax.tree.map(lambda leaf: leaf[regions], sources.graphs)
        draw = partial(draw_windows, sources.bank, sources.train)
        windows = jax.vmap(lambda graph, k: draw(graph.nodes, config.windows, key=k))(
            graphs, jax.random.split(window_key, config.regions)
        )
        forecast = jax.vmap(partial(batch_forecast, model), in_axes=(None, 0, 0))(params, graphs, windows)
        return masked_huber(forecast, windows.target, windows.mask)

    @partial(jax.jit, donate_argnums=(0, 1))
    def train(params: Params, opt_state: optax.OptState, sources: Sources, key: Key, first: jax.Array) -> tuple:
        def step(carry: tuple, index: jax.Array) -> tuple:
            params, opt_state = carry
            loss, grads = jax.value_and_grad(loss_fn)(params, sources, jax.random.fold_in(key, index))
            updates, opt_state = optimiser.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        (params, opt_state), losses = jax.lax.scan(step, (params, opt_state), first + jnp.arange(steps_per_call))
        return params, opt_state, losses.mean()

    @jax.jit
    def evaluate(params: Params, sources: Sources) -> jax.Array:
        measure = partial(validation_error, model, params, sources.bank, sources.train)
        errors = jax.lax.map(measure, sources.regions)
        return (errors * odds).sum() / odds.sum()

    opt_state = optimiser.init(params)
    best, best_error = jax.tree.map(jnp.copy, params), np.inf
    for done in range(0, config.steps, steps_per_call):
        params, opt_state, loss = train(params, opt_state, sources, train_key, jnp.asarray(done))
        error = float(evaluate(params, sources))
        if not np.isfinite(float(loss)):
            raise FloatingPointError(
                f"the loss of the pooled base is not finite near step {done}; lower its learning rate"
            )
        if error < best_error:
            best, best_error = jax.tree.map(jnp.copy, params), error
        if progress:
            progress(done + steps_per_call, {"train_loss": float(loss), "validation_loss": error})
    return best
