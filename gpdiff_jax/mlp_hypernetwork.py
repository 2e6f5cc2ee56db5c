"""In: codes of the zoo and prompts. Out: a deterministic network from prompt to code, the null that is trained.

It gets what the denoiser gets: the same codes, both losses with the same weights, the same optimiser, number of steps,
prompt noise and average of its weights, and it is chosen on the same held-out regions. What it lacks is the diffusion,
and with it noise levels and the weights of theirs (`min_snr_gamma`, `functional_by_signal`).
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from gpdiff_jax.base import steps_between_evaluations
from gpdiff_jax.codec import Codec
from gpdiff_jax.diffusion.losses import DiffusionBatch, bind_functional
from gpdiff_jax.diffusion.training import PretrainConfig, PretrainState, ZooCodes, draw_batch
from gpdiff_jax.errors import InputError
from gpdiff_jax.hypernetwork import Hypernetwork
from gpdiff_jax.models.protocol import Model
from gpdiff_jax.optimisers import clipped_adam
from gpdiff_jax.pretraining import encode_training_set
from gpdiff_jax.prompts.prompt import Prompts, scale_prompts
from gpdiff_jax.sources import Sources
from gpdiff_jax.typing import Key, Params
from gpdiff_jax.zoo import ParameterZoo


class PromptMlp(nn.Module):
    """Prompt to code through a bottleneck and one wide layer; begins at a code of zeros, the mean of the zoo."""

    bottleneck: int
    width: int
    code_shape: tuple[int, int]

    @nn.compact
    def __call__(self, prompt: Float[Array, "B E"]) -> Float[Array, "B rows width"]:
        """Returns the codes of a batch of prompts."""
        hidden = nn.silu(nn.Dense(self.bottleneck, name="prompt_in")(prompt))
        hidden = nn.gelu(nn.Dense(self.width, name="hidden")(hidden))
        rows, width = self.code_shape
        code = nn.Dense(rows * width, kernel_init=nn.initializers.zeros_init(), name="code_out")(hidden)
        return code.reshape(-1, rows, width)


@dataclasses.dataclass(frozen=True, eq=False)
class MlpHypernetwork:
    """The trained network beside the generator whose codes and scaled prompts it shares."""

    network: PromptMlp
    variables: Params
    hypernetwork: Hypernetwork

    def params(self, prompts: Prompts) -> Params:
        """Parameters of every region from its prompt.

        Args:
          prompts: of R regions; the first variant is read.

        Returns:
          Leaves [R, ...].
        """
        codec = self.hypernetwork.codec
        told = scale_prompts(prompts, self.hypernetwork.prompt_scaler)[0]
        codes = _predict(self.network, self.variables, told, jnp.asarray(codec.mask()))
        return jax.vmap(codec.params)(codes)


def make_network(hypernetwork: Hypernetwork) -> PromptMlp:
    """The network that stands beside a generator: bottleneck and width of its denoiser, shape of its codes."""
    rows, width = hypernetwork.codec.mask().shape
    config = hypernetwork.denoiser_config
    return PromptMlp(config.prompt_bottleneck, config.width, (rows, width))


def mlp_hypernetwork(
    zoo: ParameterZoo,
    hypernetwork: Hypernetwork,
    held_out: Bool[np.ndarray, " R"],
    config: PretrainConfig,
    *,
    key: Key,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> MlpHypernetwork:
    """Trains the network on the zoo that a generator was trained on.

    Args:
      zoo: harvested parameters and prompts, with the sources attached.
      hypernetwork: the generator; lends its codec, the scale of its prompts and its sizes.
      held_out: [R], the regions that the generator was chosen on: `choice_regions`.
      config: of the generator; what belongs to diffusion alone is not read.
      key: random key.
      progress: called with (steps done, metrics) after every evaluation.

    Returns:
      The network with the lowest functional loss on the held-out regions.

    Raises:
      InputError: the zoo has no sources.
      FloatingPointError: the loss is not finite; names the step.
    """
    if zoo.sources is None:
        raise InputError("the zoo has no sources attached; load it with `load_zoo(folder, sources)`")
    codes = encode_training_set(zoo, hypernetwork.codec, hypernetwork.prompt_scaler, held_out)
    network, model = make_network(hypernetwork), hypernetwork.model
    variables = train_network(
        network, model, zoo.sources, codes, hypernetwork.codec, held_out, config, key=key, progress=progress
    )
    return MlpHypernetwork(network, variables, hypernetwork)


def train_network(
    network: PromptMlp,
    model: Model,
    sources: Sources,
    zoo: ZooCodes,
    codec: Codec,
    held_out: Bool[np.ndarray, " R"],
    config: PretrainConfig,
    *,
    key: Key,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> Params:
    """Trains a network from prompts to codes; arguments and result as of `diffusion.training.train_denoiser`."""
    init_key, train_key, evaluate_key = jax.random.split(key, 3)
    mask = jnp.asarray(codec.mask())
    warmup = max(1, config.steps // 20)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, max(config.steps, warmup + 1), 0.05 * config.learning_rate
    )
    optimiser = clipped_adam(schedule, weight_decay=config.weight_decay)
    steps_per_call = steps_between_evaluations(config.steps, config.evaluations)

    # The data are arguments of what is compiled: closed over, they would be written into the program as constants.
    def loss_fn(variables: Params, batch: DiffusionBatch, sources: Sources, codec: Codec, key: Key) -> tuple:
        noise_key, window_key = jax.random.split(key)
        prompt = batch.prompt + config.prompt_noise * jax.random.normal(noise_key, batch.prompt.shape)
        x0 = _predict(network, variables, prompt, mask)
        # The token loss of a denoiser that predicts v or x0 is this one where all is noise.
        token_loss = (jnp.square(x0 - batch.x0) * mask[None]).sum() / (mask.sum() * x0.shape[0])
        functional_loss = bind_functional(model, sources, codec, config.windows)(x0, batch, key=window_key).mean()
        loss = config.token_weight * token_loss + config.functional_weight * functional_loss
        return loss, {"loss": loss, "token_loss": token_loss, "functional_loss": functional_loss}

    @partial(jax.jit, donate_argnums=0)
    def train(state: PretrainState, sources: Sources, zoo: ZooCodes, codec: Codec, key: Key) -> tuple:
        def advance(state: PretrainState, _: None) -> tuple:
            batch_key, loss_key = jax.random.split(jax.random.fold_in(key, state.step))
            batch = draw_batch(zoo, config.batch, key=batch_key)
            grads, metrics = jax.grad(loss_fn, has_aux=True)(state.variables, batch, sources, codec, loss_key)
            updates, opt_state = optimiser.update(grads, state.opt_state, state.variables)
            variables = optax.apply_updates(state.variables, updates)
            count = state.step.astype(jnp.float32)
            decay = jnp.minimum(config.ema, (1.0 + count) / (10.0 + count))
            ema = optax.incremental_update(variables, state.ema, 1.0 - decay)
            return PretrainState(state.step + 1, variables, ema, opt_state), metrics

        state, metrics = jax.lax.scan(advance, state, length=steps_per_call)
        return state, jax.tree.map(jnp.mean, metrics)

    rows = jnp.asarray(np.flatnonzero(held_out), jnp.int32)
    city = np.asarray(sources.city_index)[held_out]
    weights = jnp.asarray(1.0 / np.bincount(city)[city] if len(city) else np.zeros(0), jnp.float32)

    @jax.jit
    def evaluate(variables: Params, sources: Sources, zoo: ZooCodes, codec: Codec, key: Key) -> jax.Array:
        functional = bind_functional(model, sources, codec, config.windows)

        def one_variant(variant: jax.Array) -> jax.Array:
            prompt = zoo.prompts[variant, rows]
            x0 = _predict(network, variables, prompt, mask)
            batch = DiffusionBatch(x0, prompt, rows, jnp.broadcast_to(variant, rows.shape))
            loss = functional(x0, batch, key=jax.random.fold_in(key, variant))
            return (loss * weights).sum() / weights.sum()

        return jax.lax.map(one_variant, jnp.arange(zoo.prompts.shape[0], dtype=jnp.int32)).mean()

    variables: Params = network.init(init_key, zoo.prompts[0, :1])["params"]
    state = PretrainState(
        jnp.zeros((), jnp.int32), variables, jax.tree.map(jnp.copy, variables), optimiser.init(variables)
    )
    best, best_error = state.ema, np.inf
    for done in range(steps_per_call, config.steps + 1, steps_per_call):
        state, metrics = train(state, sources, zoo, codec, train_key)
        metrics = {name: float(value) for name, value in metrics.items()}
        if not np.isfinite(metrics["loss"]):
            raise FloatingPointError(f"the loss of the MLP is not finite near step {done}; lower its learning rate")
        error = float(evaluate(state.ema, sources, zoo, codec, evaluate_key)) if len(rows) else -float(done)
        if error < best_error:
            best, best_error = jax.tree.map(jnp.copy, state.ema), error
        if progress:
            progress(done, metrics | ({"validation_functional_loss": error} if len(rows) else {}))
    return best


def _predict(
    network: PromptMlp, variables: Params, prompt: Float[Array, "B E"], mask: Float[Array, "rows width"]
) -> Float[Array, "B rows width"]:
    codes = network.apply({"params": variables}, prompt)
    assert isinstance(codes, jax.Array)
    return codes * mask[None]
