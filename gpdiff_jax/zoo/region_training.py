"""In: one source region, where it starts, and the series of all. Out: its own parameters, a few vectors of them.

Written for one region; the engine in `harvest` adds the region axis.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from gpdiff_jax.data.series import SeriesBank
from gpdiff_jax.data.sources import SourceRegion
from gpdiff_jax.data.windows import StartTable, draw_starts, draw_unseen_starts, gather_draw, gather_unseen, part_of
from gpdiff_jax.errors import InputError, check_above_zero, check_at_least, named
from gpdiff_jax.models.loss import anchor_loss, batch_forecast, masked_huber
from gpdiff_jax.models.protocol import Model, ModelSizes
from gpdiff_jax.training.optimisers import clipped_adam
from gpdiff_jax.typing import Key, Params
from gpdiff_jax.zoo.pooled import initial_params, validation_error

INITS = ("pooled", "shared", "random")


@dataclasses.dataclass(frozen=True)
class HarvestConfig:
    """How the regions are trained, one by one.

    `init` says where a region starts: "pooled" the parameters trained on all regions, "shared" one random draw for
    all, "random" a draw of its own. Every region is trained `seeds` x `data_windows` times: with other batches, and on
    each of so many equal stretches of its training span alone. A training stops after `patience` evaluations without a
    better validation error and keeps its best `snapshots`; one of a region without a reading to validate on takes all
    steps and keeps its last. What is evaluated and kept is a running average of the parameters over about 1 / (1 -
    `averaging`) steps. Where a city shows no weekend at all (or no weekday), `anchor_windows` windows a step hold the
    region to what its start says of such days, which its own readings would let drift; 0 lets it. That takes profile
    covariates: without them the start knows nothing of the region that is worth holding to. `regions_per_batch` regions
    are trained side by side: 1 suits a CPU's cache, many an accelerator, and 0 measures what suits the device; None is
    1 on a CPU, and elsewhere measured by `harvest_zoo`.
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
    seeds: int = 1
    data_windows: int = 1
    regions_per_batch: int | None = None

    def __post_init__(self) -> None:
        if self.init not in INITS:
            raise InputError(f"`init` must be one of {', '.join(INITS)}, got {self.init!r}")
        may_be_zero = ("anchor_windows", "regions_per_batch", "averaging")
        others = [field.name for field in dataclasses.fields(self) if field.name not in ("init", *may_be_zero)]
        check_above_zero(named(self, *others))
        check_at_least(0, named(self, "anchor_windows", "regions_per_batch"))
        if not 0 <= self.averaging < 1:
            raise InputError(f"`averaging` must be in [0, 1), got {self.averaging}")
        if self.steps % self.evaluate_every or self.steps < self.snapshots * self.evaluate_every:
            raise InputError(
                f"`steps` of a region (={self.steps}) must be a multiple of `evaluate_every` (={self.evaluate_every}), "
                f"after which each snapshot is taken, and at least that times `snapshots` (={self.snapshots}), "
                f"{self.snapshots * self.evaluate_every}; take {self._nearest_steps()} (--region_steps)"
            )

    def _nearest_steps(self) -> int:
        """The least number of steps that goes, from the one that does not."""
        return max(-(-self.steps // self.evaluate_every), self.snapshots) * self.evaluate_every

    @property
    def vectors(self) -> int:
        """M, parameter vectors per region."""
        return self.snapshots * self.seeds * self.data_windows


class HarvestedRegion(NamedTuple):
    """M parameter vectors of one region, the best first, and where each came from; stacked over R after harvest."""

    params: Params  # [M, ...]
    validation_mae: Float[Array | np.ndarray, "*R M"]  # scaled; NaN where the region has no reading to validate on
    step: Int[Array | np.ndarray, "*R M"]  # training steps behind the vector
    seed: Int[Array | np.ndarray, "*R M"]  # which of the seeds
    data_window: Int[Array | np.ndarray, "*R M"]  # which stretch of the training span
    start_mae: Float[Array | np.ndarray, "*R"]  # the validation error of where seed 0 started


class Pace(NamedTuple):
    """How far and how fast regions are trained: numbers that one program takes, whatever they are."""

    steps: Int[Array, "*devices"]
    patience: Int[Array, "*devices"]
    learning_rate: Float[Array, "*devices"]
    new_share: Float[Array, "*devices"]  # of the newest parameters in the running average: 1 - `averaging`

    @classmethod
    def of(cls, config: HarvestConfig) -> "Pace":
        """The numbers of a configuration."""
        whole = np.asarray([config.steps, config.patience], np.int32)
        real = np.asarray([config.learning_rate, 1.0 - config.averaging], np.float32)
        return cls(*jax.device_put((*whole, *real)))


class SharedData(NamedTuple):
    """What the training of every region reads."""

    bank: SeriesBank
    train: StartTable
    pooled: Params
    start_key: Key
    train_key: Key
    pace: Pace


def make_region_trainer(
    model: Model, sizes: ModelSizes, config: HarvestConfig
) -> Callable[[SharedData, SourceRegion], HarvestedRegion]:
    """Makes the pure function that trains one region.

    Args:
      model: the forecaster.
      sizes: H, P, I, F.
      config: sizes; steps, patience, learning rate and averaging are those of the shared data's `Pace`.

    Returns:
      `train(shared, region) -> HarvestedRegion`. A region's randomness is folded in from its stable id, so its result
      depends on nothing else.
    """

    def start_of(shared: SharedData, region: SourceRegion, seed: Int[Array, ""]) -> Params:
        if config.init == "pooled":
            return shared.pooled
        own = jax.random.fold_in(shared.start_key, seed)
        if config.init == "random":
            own = jax.random.fold_in(own, region.region_id)
        return initial_params(model, jax.tree.map(lambda leaf: leaf[None], region.graph), sizes, key=own)

    def train_once(shared: SharedData, region: SourceRegion, run: Int[Array, ""]) -> HarvestedRegion:
        bank, nodes, pace = shared.bank, region.graph.nodes, shared.pace
        optimiser = clipped_adam(pace.learning_rate)
        seed, data_window = run // config.data_windows, run % config.data_windows
        table = part_of(shared.train, data_window, config.data_windows)
        run_key = jax.random.fold_in(jax.random.fold_in(shared.train_key, region.region_id), run)
        start = start_of(shared, region, seed)
        # As one vector: one fused update of a step, instead of one for every leaf.
        vector, as_tree = ravel_pytree(start)
        held = config.anchor_windows > 0 and bank.has_profile

        def draw(index: Int[Array, ""]) -> tuple:
            data_key, unseen_key = jax.random.split(jax.random.fold_in(run_key, index))
            drawn = draw_starts(bank, table, nodes[0], config.windows, key=data_key)
            if not held:
                return drawn, None
            return drawn, draw_unseen_starts(bank, table, nodes[0], config.anchor_windows, key=unseen_key)

        def loss_fn(params: Params, draws: tuple) -> jax.Array:
            windows = gather_draw(bank, nodes, draws[0])
            loss = masked_huber(batch_forecast(model, params, region.graph, windows), windows.target, windows.mask)
            if not held:
                return loss
            return loss + anchor_loss(model, params, start, region.graph, gather_unseen(bank, nodes, draws[1]))

        def update(carry: tuple, draws: tuple) -> tuple:
            params, average, opt_state = carry
            grads, _ = ravel_pytree(jax.grad(loss_fn)(as_tree(params), draws))
            updates, opt_state = optimiser.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            # What the last few batches happened to hold is noise to the generator.
            average = optax.incremental_update(params, average, pace.new_share.astype(average.dtype))
            return (params, average, opt_state), None

        def error_of(params: jax.Array) -> jax.Array:
            return validation_error(model, as_tree(params), bank, shared.train, region)

        def unfinished(carry: tuple) -> jax.Array:
            step, stale, _, _, scores, _, _ = carry
            return (step < pace.steps) & ((stale < pace.patience) | (jnp.isinf(scores).any()))

        def advance(carry: tuple) -> tuple:
            step, stale, training, kept, scores, errors, steps = carry
            # Random numbers of many steps at once cost hardly more than those of one.
            draws = jax.vmap(draw)(step + jnp.arange(config.evaluate_every, dtype=step.dtype))
            training, _ = jax.lax.scan(update, training, draws)
            params = training[1]
            step = step + config.evaluate_every
            error = error_of(params)
            # Where nothing was observed to judge by, every evaluation is better than the one before it.
            score = jnp.where(region.validated, error, -step.astype(error.dtype))
            stale = jnp.where(score < scores.min(), 0, stale + 1)
            worst = jnp.argmax(scores)
            better = score < scores[worst]
            kept = jnp.where(better, kept.at[worst].set(params), kept)
            scores = jnp.where(better, scores.at[worst].set(score), scores)
            errors = jnp.where(better, errors.at[worst].set(error), errors)
            steps = jnp.where(better, steps.at[worst].set(step), steps)
            return step, stale, training, kept, scores, errors, steps

        kept = jnp.broadcast_to(vector, (config.snapshots, vector.size))
        start_error = error_of(vector)
        worst_of_all = jnp.full((config.snapshots,), jnp.inf, start_error.dtype)
        zero = jnp.zeros((), jnp.int32)
        training = (vector, vector, optimiser.init(vector))
        carry = (zero, zero, training, kept, worst_of_all, worst_of_all, jnp.zeros((config.snapshots,), jnp.int32))
        *_, kept, _, errors, steps = jax.lax.while_loop(unfinished, advance, carry)
        every = jnp.zeros((config.snapshots,), jnp.int32)
        return HarvestedRegion(jax.vmap(as_tree)(kept), errors, steps, every + seed, every + data_window, start_error)

    def train(shared: SharedData, region: SourceRegion) -> HarvestedRegion:
        runs = jnp.arange(config.seeds * config.data_windows, dtype=jnp.int32)
        *vectors, start_error = jax.lax.map(lambda run: train_once(shared, region, run), runs)
        vectors = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), vectors)
        # The last first where there is no error to go by.
        order = jnp.argsort(jnp.where(region.validated, vectors[1], -vectors[2].astype(vectors[1].dtype)))
        return HarvestedRegion(*jax.tree.map(lambda leaf: leaf[order], vectors), start_mae=start_error[0])

    return train
