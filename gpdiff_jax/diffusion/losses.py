"""In: a batch of the zoo and a denoiser. Out: the token loss, and the error of the forecasts of what was denoised."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gpdiff_jax.data.sources import Sources
from gpdiff_jax.data.windows import draw_windows
from gpdiff_jax.diffusion.denoiser import Denoiser, denoise
from gpdiff_jax.diffusion.objectives import denoised, min_snr_weight, target
from gpdiff_jax.diffusion.schedules import SCHEDULES, add_noise
from gpdiff_jax.models.loss import anchor_loss, batch_forecast, masked_huber
from gpdiff_jax.models.protocol import Model
from gpdiff_jax.typing import Key
from gpdiff_jax.zoo.codec import Codec
from gpdiff_jax.zoo.tokens import from_tokens

# Latents are of unit size; one made from eps is divided by the signal, and so of any size where hardly any is left.
_LARGEST_LATENT = 4.0
# Examples at a time; a batch of the training is mostly smaller, what is held out of very many regions is not.
SIDE_BY_SIDE = 256


@flax.struct.dataclass
class DiffusionBatch:
    """B draws from the zoo."""

    x0: Float[Array, "*devices B Z D"]  # latents
    prompt: Float[Array, "*devices B E"]
    region: Int[Array, "*devices B"]
    variant: Int[Array, "*devices B"]  # the random window that the prompt was made from
    number: Int[Array, "*devices B"]  # place in the whole batch; seeds what is drawn for it, on whatever device


def example_keys(batch: DiffusionBatch, key: Key) -> Key:
    """A key for every example of a batch, whatever part of the whole batch it is; typed keys [B]."""
    return jax.vmap(partial(jax.random.fold_in, key))(batch.number)


class DiffusionLosses(NamedTuple):
    """What is minimised and what it is made of."""

    loss: jax.Array
    token_loss: jax.Array
    functional_loss: jax.Array


def functional_losses(
    model: Model,
    sources: Sources,
    codec: Codec,
    windows_per_region: int,
    x0: Float[Array, "B Z D"],
    batch: DiffusionBatch,
    *,
    key: Key,
) -> Float[Array, " B"]:
    """Forecast loss of generated parameters on windows of their own region, seen through the prompt's variant.

    With profile covariates, on the kind of day that a city never shows, the pooled model's own forecast stands for the
    truth: see `draw_unseen_starts`.

    Args:
      model: the forecaster.
      sources: the source regions.
      codec: from latents to parameters.
      windows_per_region: windows drawn for each.
      x0: [B, Z, D], latents to be judged.
      batch: names the regions and variants.
      key: random key; an example's number is folded in.

    Returns:
      float32 [B], Huber loss in standard deviations.
    """
    bank, table = sources.bank, sources.train
    anchor = from_tokens(codec.layout, codec.pooled_tokens)

    def one(latent: jax.Array, region: jax.Array, variant: jax.Array, key: Key) -> jax.Array:
        graph = jax.tree.map(lambda leaf: leaf[region], sources.graphs)
        data_key, unseen_key = jax.random.split(key)
        params = codec.params(latent)
        draw = partial(draw_windows, bank, table, graph.nodes, variant=variant)
        windows = draw(windows_per_region, key=data_key)
        loss = masked_huber(batch_forecast(model, params, graph, windows), windows.target, windows.mask)
        if not bank.has_profile:
            return loss
        unseen = draw(windows_per_region // 4 + 1, key=unseen_key, unseen=True)
        return loss + anchor_loss(model, params, anchor, graph, unseen)

    rows = x0, batch.region, batch.variant, example_keys(batch, key)
    return jax.lax.map(lambda row: one(*row), rows, batch_size=SIDE_BY_SIDE)


def make_diffusion_loss(
    denoiser: Denoiser,
    functional: Callable[..., Float[Array, " B"]],
    mask: Float[Array, "Z D"],
    *,
    functional_weight: float,
    token_weight: float,
    prompt_dropout: float,
    prompt_noise: float,
    pure_noise_share: float,
    min_snr_gamma: float = 0.0,
    functional_by_signal: bool = False,
) -> Callable[..., tuple[jax.Array, DiffusionLosses]]:
    """Makes `loss(variables, batch, key) -> (loss, parts)`, means over the batch.

    What is drawn for an example comes from the key and its number alone, so that a batch may be cut into parts.

    Args:
      denoiser: the network; its configuration names the schedule and the objective.
      functional: `functional_losses` with all but its last arguments bound.
      mask: [Z, D], 1 where a parameter lies.
      functional_weight: weight of the functional loss beside the token loss.
      token_weight: weight of the token loss.
      prompt_dropout: share of the batch whose prompt is dropped.
      prompt_noise: deviation of the noise on the prompt, which keeps a few hundred regions from being learned by heart.
      pure_noise_share: share of the batch at t = 1, where the prompt is all there is; the rest is uniform in t.
      min_snr_gamma: see `min_snr_weight`; 0 weighs the token loss of every noise level alike.
      functional_by_signal: whether the functional loss is weighted by alpha^2 / (alpha^2 + sigma^2).

    Returns:
      The loss function.
    """
    schedule, objective = SCHEDULES[denoiser.config.schedule], denoiser.config.objective

    def loss_fn(variables: dict, batch: DiffusionBatch, key: Key) -> tuple[jax.Array, DiffusionLosses]:
        noise_key, functional_key = jax.random.split(key)
        size = batch.region.shape[0]

        def draw(key: Key) -> tuple[jax.Array, jax.Array, jax.Array]:
            keys = jax.random.split(key, 3)
            normals = (jax.random.normal(keys[1], mask.shape), jax.random.normal(keys[2], batch.prompt.shape[1:]))
            return jax.random.uniform(keys[0], (3,)), *normals

        uniform, eps, prompt_eps = jax.vmap(draw)(example_keys(batch, noise_key))
        t = jnp.where(uniform[:, 1] < pure_noise_share, 1.0, uniform[:, 0])
        prompt_mask = (uniform[:, 2] >= prompt_dropout).astype(jnp.float32)
        eps, prompt = eps * mask[None], batch.prompt + prompt_noise * prompt_eps
        level = schedule(t[:, None, None])
        level = type(level)(*(jnp.broadcast_to(part, eps.shape) for part in level))
        x_t = add_noise(level, batch.x0, eps)
        prediction = denoise(denoiser, variables, x_t, t, prompt, prompt_mask) * mask[None]
        squared = jnp.square(prediction - target(objective, level, batch.x0, eps)) * mask[None]
        if min_snr_gamma:
            squared = squared * min_snr_weight(objective, level, min_snr_gamma)
        token_loss = squared.sum() / (mask.sum() * size)
        x0 = denoised(objective, level, x_t, prediction).x0
        if objective == "eps":
            x0 = jnp.clip(x0, -_LARGEST_LATENT, _LARGEST_LATENT)
        forecast_losses = functional(x0, batch, key=functional_key)
        if functional_by_signal:
            power = [jnp.square(part[:, 0, 0]) for part in level]
            forecast_losses = forecast_losses * (power[0] / (power[0] + power[1]))
        forecast_loss = forecast_losses.mean()
        loss = token_weight * token_loss + functional_weight * forecast_loss
        return loss, DiffusionLosses(loss, token_loss, forecast_loss)

    return loss_fn


def bind_functional(
    model: Model, sources: Sources, codec: Codec, windows_per_region: int
) -> Callable[..., Float[Array, " B"]]:
    """`functional_losses` with all but the latents, the batch and the key bound."""
    return partial(functional_losses, model, sources, codec, windows_per_region)
