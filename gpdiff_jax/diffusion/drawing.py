"""In: a trained denoiser and scaled prompts. Out: latents, drawn from noise that each draw's own numbers seed."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from gpdiff_jax.diffusion.denoiser import Denoiser, denoise, in_parts
from gpdiff_jax.diffusion.objectives import Denoised, denoised
from gpdiff_jax.diffusion.samplers import guided, sample
from gpdiff_jax.diffusion.schedules import SCHEDULES
from gpdiff_jax.typing import Key, Params


class Draws(NamedTuple):
    """X draws, each of one sample of one region; on the host or on the device."""

    sample: Int[Array, " X"]
    region_id: UInt32[Array, " X"]
    prompt: Float[Array, "X E"]
    prompt_mask: Float[Array, " X"]  # 0 where the prompt is dropped


Steer = Callable[[Float[Array, "X Z D"]], Float[Array, "X Z D"]]
"""Of what x_t is expected to become, to what it shall be taken for instead."""


def draw_latents(
    denoiser: Denoiser,
    variables: Params,
    mask: Float[Array, "Z D"],
    draws: Draws,
    *,
    key: Key,
    sampler: str,
    steps: int,
    guidance: float = 1.0,
    steer: Steer | None = None,
    side_by_side: int | None = None,
) -> Float[Array, "X Z D"]:
    """Latents of X draws; the noise of each comes from its sample's number and its region's id.

    Args:
      denoiser: the network.
      variables: its variables.
      mask: 1 where a latent holds something.
      draws: samples, regions and prompts.
      key: random key; sample and region are folded in.
      sampler: one of `samplers.SAMPLERS`.
      steps: its evaluations.
      guidance: see `samplers.guided`.
      steer: called with the clean part of x_t at every step, whose noise part stays; None leaves it as it is.
      side_by_side: draws that the network works on at a time; None for all.

    Returns:
      Latents, 0 on padding.
    """
    own_keys = jax.vmap(lambda *ids: functools.reduce(jax.random.fold_in, ids, key))(draws.sample, draws.region_id)
    # One key for the noise at the start, another for that of the steps.
    start_keys, step_keys = jnp.moveaxis(jax.vmap(jax.random.split)(own_keys), 1, 0)
    config = denoiser.config

    def predict(x_t: jax.Array, time: jax.Array, prompt: jax.Array, prompt_mask: jax.Array) -> jax.Array:
        prediction = denoise(denoiser, variables, x_t, time, prompt, prompt_mask)
        if guidance != 1.0:
            unconditional = denoise(denoiser, variables, x_t, time, prompt, jnp.zeros_like(prompt_mask))
            prediction = guided(prediction, unconditional, guidance)
        return prediction

    def denoise_fn(x_t: jax.Array, t: jax.Array) -> Denoised:
        rows = x_t, jnp.broadcast_to(t, x_t.shape[:1]), draws.prompt, draws.prompt_mask
        prediction = in_parts(predict, rows, side_by_side)
        parts = denoised(config.objective, SCHEDULES[config.schedule](t), x_t, prediction * mask[None])
        return parts if steer is None else parts._replace(x0=steer(parts.x0) * mask[None])

    def normal(keys: Key) -> jax.Array:
        return jax.vmap(lambda key: jax.random.normal(key, mask.shape))(keys) * mask[None]

    def fresh(step: jax.Array) -> jax.Array:
        return normal(jax.vmap(lambda own: jax.random.fold_in(own, step))(step_keys))

    return sample(sampler, config.schedule, denoise_fn, normal(start_keys), steps, fresh)
