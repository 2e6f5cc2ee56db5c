"""In: codes of the zoo and prompts. Out: a trained denoiser, chosen on source regions that were held out."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpdiff_jax.base import steps_between_evaluations
from gpdiff_jax.codec import Codec, CodecConfig
from gpdiff_jax.diffusion.denoiser import DenoiserConfig, denoise, make_denoiser
from gpdiff_jax.diffusion.losses import DiffusionBatch, bind_functional, make_diffusion_loss
from gpdiff_jax.diffusion.objectives import Denoised, denoised
from gpdiff_jax.diffusion.samplers import ddim
from gpdiff_jax.diffusion.schedules import SCHEDULES
from gpdiff_jax.errors import InputError
from gpdiff_jax.models.protocol import Model
from gpdiff_jax.optimisers import clipped_adam
from gpdiff_jax.sources import Sources
from gpdiff_jax.typing import Key, Params

_EPS_STEPS = 10


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """How the generator is trained.

    `min_snr_gamma` above 0 weighs the token loss of a noise level by min-SNR; `functional_by_signal` weighs the
    functional loss by how much of x_t is signal.
    """

    denoiser: DenoiserConfig = dataclasses.field(default_factory=DenoiserConfig)
    codec: CodecConfig = dataclasses.field(default_factory=CodecConfig)
    steps: int = 2000
    batch: int = 32
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
        for name in ("steps", "batch", "windows", "learning_rate", "evaluations"):
            if getattr(self, name) <= 0:
                raise InputError(f"`{name}` must be above 0, got {getattr(self, name)}")
        for name in ("functional_weight", "token_weight", "prompt_noise", "weight_decay", "min_snr_gamma"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InputError(f"`{name}` must be a number of at least 0, got {getattr(self, name)}")
        for name in ("ema", "prompt_dropout", "pure_noise_share", "held_out_share"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"`{name}` must be in [0, 1), got {getattr(self, name)}")
        if self.min_snr_gamma and self.functional_by_signal and self.denoiser.schedule != "linear":
            # Both weights are 0 where no signal is left, which is where every draw begins.
            raise InputError(
                f"`min_snr_gamma` (={self.min_snr_gamma}) and `functional_by_signal` together teach nothing where "
                f"schedule {self.denoiser.schedule!r} ends, in pure noise; choose one of them, or the schedule 'linear'"
            )


@flax.struct.dataclass
class PretrainState:
    """The denoiser in training."""

    step: jax.Array  # int32
    variables: Params
    ema: Params
    opt_state: optax.OptState


@flax.struct.dataclass
class ZooCodes:
    """The training set of the generator, on the device."""

    x0: jax.Array  # float32 [R, S, L, W], codes
    prompts: jax.Array  # float32 [V, R, E]
    odds: jax.Array  # float32 [R], how often a region is drawn; 0 where held out
    prompt_names: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())  # E


def draw_batch(zoo: ZooCodes, size: int, *, key: jax.Array) -> DiffusionBatch:
    """Draws regions by their odds, and for each a snapshot and a prompt variant."""
    keys = jax.random.split(key, 3)
    region = jax.random.categorical(keys[0], jnp.log(zoo.odds), shape=(size,)).astype(jnp.int32)
    snapshot = jax.random.randint(keys[1], (size,), 0, zoo.x0.shape[1])
    variant = jax.random.randint(keys[2], (size,), 0, zoo.prompts.shape[0], dtype=jnp.int32)
    return DiffusionBatch(zoo.x0[region, snapshot], zoo.prompts[variant, region], region, variant)


def held_out_regions(sources: Sources, share: float, *, key: Key) -> np.ndarray:
    """A random share of every city's regions, kept from training to choose on; bool [R]."""
    city, held = np.asarray(sources.city_index), np.zeros(sources.num_regions, bool)
    for index in np.unique(city):
        rows = np.flatnonzero(city == index)
        count = min(max(1, round(share * len(rows))), len(rows) - 1) if share > 0 else 0
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, int(index)), len(rows)))
        held[rows[order[:count]]] = True
    return held


def train_denoiser(
    model: Model,
    sources: Sources,
    zoo: ZooCodes,
    codec: Codec,
    held_out: np.ndarray,
    config: PretrainConfig,
    *,
    key: Key,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> Params:
    """Trains the denoiser on the zoo.

    Args:
      model: the forecaster, for the functional loss.
      sources: the source regions.
      zoo: codes, prompts and odds.
      codec: from codes to parameters.
      held_out: bool [R], the regions to choose on.
      config: sizes.
      key: random key.
      progress: called with (steps done, metrics) after every evaluation.

    Returns:
      The averaged variables of the network at the lowest functional loss on the held-out regions, or at the end where
      nothing was held out.

    Raises:
      InputError: the denoiser's conditioning needs a part that the prompts lack.
      FloatingPointError: the loss is not finite; names the step.
    """
    keys = jax.random.split(key, 3)
    denoiser = make_denoiser(config.denoiser, codec, zoo.prompt_names)
    mask, level_at = jnp.asarray(codec.mask()), SCHEDULES[config.denoiser.schedule]
    # From pure noise one step makes the mean of x0 given the prompt; eps, divided by hardly any signal, needs several.
    evaluation_steps = _EPS_STEPS if config.denoiser.objective == "eps" else 1

    # The data are arguments of what is compiled: closed over, they would be written into the program as constants.
    def functional_of(sources: Sources, codec: Codec) -> Callable[..., jax.Array]:
        return bind_functional(model, sources, codec, config.windows)

    warmup = max(1, config.steps // 20)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, max(config.steps, warmup + 1), 0.05 * config.learning_rate
    )
    optimiser = clipped_adam(schedule, weight_decay=config.weight_decay)
    steps_per_call = steps_between_evaluations(config.steps, config.evaluations)

    def step(state: PretrainState, sources: Sources, zoo: ZooCodes, codec: Codec, key: Key) -> tuple:
        loss_fn = make_diffusion_loss(
            denoiser,
            functional_of(sources, codec),
            mask,
            functional_weight=config.functional_weight,
            token_weight=config.token_weight,
            prompt_dropout=config.prompt_dropout,
            prompt_noise=config.prompt_noise,
            pure_noise_share=config.pure_noise_share,
            min_snr_gamma=config.min_snr_gamma,
            functional_by_signal=config.functional_by_signal,
        )
        batch_key, loss_key = jax.random.split(jax.random.fold_in(key, state.step))
        batch = draw_batch(zoo, config.batch, key=batch_key)
        grads, parts = jax.grad(loss_fn, has_aux=True)(state.variables, batch, loss_key)
        updates, opt_state = optimiser.update(grads, state.opt_state, state.variables)
        variables = optax.apply_updates(state.variables, updates)
        # A short average first: the first steps would otherwise linger in it.
        count = state.step.astype(jnp.float32)
        decay = jnp.minimum(config.ema, (1.0 + count) / (10.0 + count))
        ema = optax.incremental_update(variables, state.ema, 1.0 - decay)
        metrics = dict(parts._asdict(), grad_norm=optax.tree.norm(grads), update_norm=optax.tree.norm(updates))
        return PretrainState(state.step + 1, variables, ema, opt_state), metrics

    @partial(jax.jit, donate_argnums=0)
    def train(
        state: PretrainState, sources: Sources, zoo: ZooCodes, codec: Codec, key: Key
    ) -> tuple[PretrainState, dict[str, jax.Array]]:
        def advance(state: PretrainState, _: None) -> tuple:
            return step(state, sources, zoo, codec, key)

        state, metrics = jax.lax.scan(advance, state, length=steps_per_call)
        return state, jax.tree.map(jnp.mean, metrics)

    rows = jnp.asarray(np.flatnonzero(held_out), jnp.int32)
    weights = jnp.asarray(_city_weights(sources, held_out))

    @jax.jit
    def evaluate(variables: Params, sources: Sources, zoo: ZooCodes, codec: Codec, key: Key) -> jax.Array:
        functional = functional_of(sources, codec)

        def one_variant(variant: jax.Array) -> jax.Array:
            noise_key, window_key = jax.random.split(jax.random.fold_in(key, variant))
            size = rows.shape[0]
            batch = DiffusionBatch(
                zoo.x0[rows, 0], zoo.prompts[variant, rows], rows, jnp.broadcast_to(variant, rows.shape)
            )
            eps = jax.random.normal(noise_key, batch.x0.shape) * mask[None]

            def parts(x_t: jax.Array, t: jax.Array) -> Denoised:
                time = jnp.broadcast_to(t, (size,))
                told = denoise(denoiser, variables, x_t, time, batch.prompt, jnp.ones(size)) * mask[None]
                return denoised(config.denoiser.objective, level_at(t), x_t, told)

            x0 = ddim(parts, level_at, eps, evaluation_steps)
            return (functional(x0, batch, key=window_key) * weights).sum()

        return jax.lax.map(one_variant, jnp.arange(zoo.prompts.shape[0], dtype=jnp.int32)).mean()

    example = zoo.x0[0, 0], jnp.zeros(()), zoo.prompts[0, 0], jnp.ones(())
    variables: Params = denoiser.init(keys[0], *example)["params"]
    state = PretrainState(
        jnp.zeros((), jnp.int32), variables, jax.tree.map(jnp.copy, variables), optimiser.init(variables)
    )
    best, best_error = state.ema, np.inf
    for done in range(steps_per_call, config.steps + 1, steps_per_call):
        state, metrics = train(state, sources, zoo, codec, keys[1])
        metrics = {name: float(value) for name, value in metrics.items()}
        if not np.isfinite(metrics["loss"]):
            raise FloatingPointError(f"the generator's loss is not finite near step {done}; lower its learning rate")
        error = float(evaluate(state.ema, sources, zoo, codec, keys[2])) if len(rows) else -float(done)
        if error < best_error:
            best, best_error = jax.tree.map(jnp.copy, state.ema), error
        if progress:
            metrics["param_norm"] = float(optax.tree.norm(state.variables))
            if len(rows):
                metrics["validation_functional_loss"] = error
            progress(done, metrics)
    return best


def _city_weights(sources: Sources, held_out: np.ndarray) -> np.ndarray:
    """float32 weights of the held-out regions, every city with the same total, summing to 1."""
    city = np.asarray(sources.city_index)[held_out]
    weights = 1.0 / np.maximum(np.bincount(city, minlength=1), 1)[city] if len(city) else np.zeros(0)
    return (weights / max(weights.sum(), 1e-9)).astype(np.float32)
