"""In: latents of the zoo, prompts and the loss of a network. Out: the network trained, chosen on held-out source
regions.

The denoiser (`denoiser_training`) and the deterministic network (`mlp_hypernetwork`) are trained alike.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from gpdiff_jax.data.sources import Sources, city_weights
from gpdiff_jax.diffusion.denoiser import DenoiserConfig
from gpdiff_jax.diffusion.losses import DiffusionBatch, DiffusionLosses, bind_functional
from gpdiff_jax.errors import InputError, check_above_zero, named
from gpdiff_jax.models.protocol import Model, model_text
from gpdiff_jax.training.loop import VALIDATION, steps_between_evaluations, train
from gpdiff_jax.training.optimisers import clipped_adam
from gpdiff_jax.training.parallel import DEVICES, training_devices
from gpdiff_jax.training.step import LossTerm, Part, TrainState, make_step, start_training
from gpdiff_jax.typing import Device, Key, Params
from gpdiff_jax.zoo.codec import Codec, CodecConfig
from gpdiff_jax.zoo.tokens import from_tokens


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """How the generator is trained.

    `batch` examples make one update, in `accumulate` parts one after another, which takes less memory. `min_snr_gamma`
    above 0 weighs the token loss of a noise level by min-SNR; `functional_by_signal` weighs the functional loss by how
    much of x_t is signal.
    """

    denoiser: DenoiserConfig = dataclasses.field(default_factory=DenoiserConfig)
    codec: CodecConfig = dataclasses.field(default_factory=CodecConfig)
    steps: int = 1000
    batch: int = 32
    accumulate: int = 1
    windows: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    ema: float = 0.99
    functional_weight: float = 5.0
    token_weight: float = 1.0
    prompt_dropout: float = 0.15
    prompt_noise: float = 0.2
    pure_noise_share: float = 0.3
    min_snr_gamma: float = 0.0
    functional_by_signal: bool = False
    evaluations: int = 20
    held_out_share: float = 0.1

    def __post_init__(self) -> None:
        check_above_zero(named(self, "steps", "batch", "accumulate", "windows", "learning_rate", "evaluations"))
        for name in ("functional_weight", "token_weight", "prompt_noise", "weight_decay", "min_snr_gamma"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InputError(f"`{name}` must be a number of at least 0, got {getattr(self, name)}")
        for name in ("ema", "prompt_dropout", "pure_noise_share", "held_out_share"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"`{name}` must be in [0, 1), got {getattr(self, name)}")
        if self.batch % self.accumulate:
            raise InputError(
                f"`accumulate` (={self.accumulate}) must divide `batch` (={self.batch}); change one of them"
            )
        if self.min_snr_gamma and self.functional_by_signal and self.denoiser.schedule != "linear":
            # Both weights are 0 where no signal is left, which is where every draw begins.
            raise InputError(
                f"`min_snr_gamma` (={self.min_snr_gamma}) and `functional_by_signal` together teach nothing where "
                f"schedule {self.denoiser.schedule!r} ends, in pure noise; choose one of them, or the schedule 'linear'"
            )


@flax.struct.dataclass
class ZooLatents:
    """The training set of the generator, on the device."""

    x0: Float[Array, "*devices R M Z D"]  # M of every region
    prompts: Float[Array, "*devices V R E"]
    probabilities: Float[Array, "*devices R"]  # how often a region is drawn; 0 where held out
    spatial: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())  # E, see `Prompts.spatial`


@flax.struct.dataclass
class TrainingData:
    """What every step reads; an argument of what is compiled: closed over, it would be written into the program."""

    sources: Sources
    zoo: ZooLatents
    codec: Codec


LossFn = Callable[[Params, TrainingData, DiffusionBatch, Key], tuple[jax.Array, DiffusionLosses]]
"""Of variables, data, B examples and a key, which an example folds its number into: means over the examples."""

PredictFn = Callable[[Params, TrainingData, DiffusionBatch, Key], jax.Array]
"""Of the same, latents [B, Z, D] that the network makes of the prompts alone."""


def draw_batch(zoo: ZooLatents, size: int, *, key: jax.Array, first: jax.Array | int = 0) -> DiffusionBatch:
    """Draws regions by their probabilities, and for each a snapshot and a prompt variant.

    Args:
      zoo: the training set.
      size: B.
      key: of the whole batch; an example's number is folded in, so that a batch may be drawn in parts.
      first: number of the first example of this part.

    Returns:
      The examples numbered `first` to `first + size`.
    """
    number = first + jnp.arange(size, dtype=jnp.int32)

    def one(number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        keys = jax.random.split(jax.random.fold_in(key, number), 3)
        region = jax.random.categorical(keys[0], jnp.log(zoo.probabilities)).astype(jnp.int32)
        snapshot = jax.random.randint(keys[1], (), 0, zoo.x0.shape[1])
        return region, snapshot, jax.random.randint(keys[2], (), 0, zoo.prompts.shape[0], dtype=jnp.int32)

    region, snapshot, variant = jax.vmap(one)(number)
    return DiffusionBatch(zoo.x0[region, snapshot], zoo.prompts[variant, region], region, variant, number)


def held_out_regions(sources: Sources, share: float, *, key: Key) -> np.ndarray:
    """A random share of every city's regions, kept from training to choose on; bool [R]."""
    city, held = np.asarray(sources.city_index), np.zeros(sources.num_regions, bool)
    for index in np.unique(city):
        rows = np.flatnonzero(city == index)
        count = min(max(1, round(share * len(rows))), len(rows) - 1) if share > 0 else 0
        order = np.asarray(_permutation(key, np.int32(index), len(rows)))
        held[rows[order[:count]]] = True
    return held


@partial(jax.jit, static_argnums=2)
def _permutation(key: Key, number: jax.Array, length: int) -> jax.Array:
    return jax.random.permutation(jax.random.fold_in(key, number), length)


def train_network(
    variables: Params,
    data: TrainingData,
    model: Model,
    held_out: np.ndarray,
    loss_fn: LossFn,
    predict_fn: PredictFn,
    config: PretrainConfig,
    *,
    key: Key,
    name: str,
    devices: Sequence[Device] | None = None,
    checkpoints: pathlib.Path | None = None,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> Params:
    """Trains a network that makes latents.

    The examples of a step are the same on any number of devices and in any number of accumulated parts, so that
    trainings differ by rounding alone.

    Args:
      variables: to begin with, float32.
      data: sources, latents and codec.
      model: the forecaster, for the functional loss.
      held_out: bool [R], the regions to choose on.
      loss_fn: what is minimised.
      predict_fn: what is chosen by.
      config: sizes.
      key: random key.
      name: of the network, for errors.
      devices: see `parallel.training_devices`.
      checkpoints: see `loop.train`.
      progress: called with (steps done, metrics) after every evaluation, see `loop.train`; the validation loss is the
        functional loss on the held-out regions.

    Returns:
      The averaged variables at the lowest functional loss on the held-out regions, or at the end where nothing was held
      out; on the default device.

    Raises:
      InputError: a batch that devices and accumulated parts do not share evenly.
      NotFiniteError: a loss, its gradient or a validation loss is not finite; names the step.
    """
    train_key, evaluate_key = jax.random.split(key)
    devices = training_devices(config.batch // config.accumulate, devices)
    optimiser = network_optimiser(config)
    shapes = jax.eval_shape(partial(from_tokens, data.codec.layout), data.codec.pooled_tokens)
    text = checkpoints and model_text(model, data.sources.sizes, shapes)
    return train(
        make_network_step(loss_fn, optimiser, config, len(devices)),
        start_training(variables, optimiser, averaged=True),
        data,
        key=train_key,
        steps=config.steps,
        evaluate_every=steps_between_evaluations(config.steps, config.evaluations),
        devices=devices,
        name=name,
        evaluate=_make_evaluate(model, predict_fn, config, data, held_out, len(devices)) if held_out.any() else None,
        evaluate_key=evaluate_key,
        checkpoints=checkpoints,
        settings=(model.name, text, dataclasses.replace(config, accumulate=1), held_out.tolist()),
        progress=progress,
    ).params


def network_optimiser(config: PretrainConfig) -> optax.GradientTransformation:
    """AdamW with a warm-up and a cosine decay."""
    warmup = max(1, config.steps // 20)
    rates = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, max(config.steps, warmup + 1), 0.05 * config.learning_rate
    )
    return clipped_adam(rates, weight_decay=config.weight_decay)


def make_network_step(
    loss_fn: LossFn, optimiser: optax.GradientTransformation, config: PretrainConfig, num_devices: int
) -> Callable[[TrainState, TrainingData, Key], tuple[TrainState, dict[str, jax.Array]]]:
    """One step of training a network that makes latents, for `loop.train`.

    Args:
      loss_fn: what is minimised.
      optimiser: of the variables.
      config: batch, accumulated parts and average.
      num_devices: that share every batch.

    Returns:
      See `step.make_step`.
    """

    def sums(
        variables: Params, data: TrainingData, part: Part, key: Key
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        batch_key, loss_key = jax.random.split(key)
        batch = draw_batch(data.zoo, part.count, key=batch_key, first=part.first)
        loss, parts = loss_fn(variables, data, batch, loss_key)
        weight = jnp.full((), part.count, loss.dtype)
        return weight * loss, weight, {name: weight * value for name, value in parts._asdict().items()}

    terms = [LossTerm("loss", sums, config.batch)]
    return make_step(terms, optimiser, num_devices=num_devices, accumulate=config.accumulate, averaging=config.ema)


def _make_evaluate(
    model: Model,
    predict_fn: PredictFn,
    config: PretrainConfig,
    data: TrainingData,
    held_out: np.ndarray,
    num_devices: int,
) -> Callable[[Params, TrainingData, Key], dict[str, jax.Array]]:
    """The functional loss on held-out regions, for `loop.train`; the devices share the variants."""
    chosen = np.flatnonzero(held_out).astype(np.int32)
    weights = _held_out_weights(data.sources, held_out)
    variants = data.zoo.prompts.shape[0]
    turns = -(-variants // num_devices)

    def evaluate(variables: Params, data: TrainingData, key: Key) -> dict[str, jax.Array]:
        functional, rows = bind_functional(model, data.sources, data.codec, config.windows), jnp.asarray(chosen)

        def one_variant(variant: jax.Array) -> jax.Array:
            predict_key, window_key = jax.random.split(jax.random.fold_in(key, variant))
            numbers = jnp.arange(len(rows), dtype=jnp.int32)
            prompts = data.zoo.prompts[variant, rows]
            batch = DiffusionBatch(data.zoo.x0[rows, 0], prompts, rows, jnp.broadcast_to(variant, rows.shape), numbers)
            x0 = predict_fn(variables, data, batch, predict_key)
            losses = functional(x0, batch, key=window_key)
            return (losses * weights.astype(losses.dtype)).sum()

        mine = jax.lax.axis_index(DEVICES) + num_devices * jnp.arange(turns, dtype=jnp.int32)
        errors = jax.lax.map(one_variant, jnp.minimum(mine, variants - 1))
        return {VALIDATION: jax.lax.psum(jnp.where(mine < variants, errors, 0.0).sum(), DEVICES) / variants}

    return evaluate


def _held_out_weights(sources: Sources, held_out: np.ndarray) -> np.ndarray:
    """float32 weights of the held-out regions, every city with the same total, summing to 1."""
    city = np.asarray(sources.city_index)[held_out]
    weights = city_weights(city) if len(city) else np.zeros(0)
    return (weights / max(weights.sum(), 1e-9)).astype(np.float32)
