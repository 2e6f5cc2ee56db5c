"""In: noisy tokens of one region, the time and the region's prompt. Out: what its objective asks for, by default v."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gpdiff_jax.diffusion.conditioning import AdaptiveNorm, Conditioner, gated_residual
from gpdiff_jax.diffusion.objectives import check_objective
from gpdiff_jax.errors import InputError
from gpdiff_jax.typing import Params


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
    """Size of the Transformer, and what it predicts along which path from data to noise."""

    width: int = 128
    layers: int = 3
    heads: int = 4
    prompt_bottleneck: int = 32
    schedule: str = "cosine"
    objective: str = "v"

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "prompt_bottleneck"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if self.width % (2 * self.heads):
            raise InputError(f"`width` (={self.width}) must be a multiple of 2 x `heads` (={self.heads})")
        check_objective(self.objective, self.schedule)


class Denoiser(nn.Module):
    """Transformer over the tokens of one parameter vector; attention never runs over regions.

    Every token carries a learned code of its place and of its layer. Written for one region; batch by `vmap`.
    """

    config: DenoiserConfig
    layer_of_token: tuple[int, ...]
    token_width: int

    @nn.compact
    def __call__(
        self, x_t: Float[Array, "L W"], t: Float[Array, ""], prompt: Float[Array, " E"], given: Float[Array, ""]
    ) -> Float[Array, "L W"]:
        """Returns the prediction for one region's tokens; `given` is 0 where the prompt is dropped."""
        config, count = self.config, len(self.layer_of_token)
        condition = Conditioner(config.width, config.prompt_bottleneck, name="condition")(t, prompt, given)
        code = nn.initializers.normal(0.2)
        place = self.param("place_code", code, (count, config.width))
        layer = self.param("layer_code", code, (max(self.layer_of_token) + 1, config.width))
        x = nn.Dense(config.width, name="tokens_in")(x_t) + place + layer[jnp.asarray(self.layer_of_token)]
        for index in range(config.layers):
            normed, gate = AdaptiveNorm(name=f"attention_norm_{index}")(x, condition)
            attended = nn.MultiHeadDotProductAttention(config.heads, name=f"attention_{index}")(normed)
            x = gated_residual(x, attended, gate)
            normed, gate = AdaptiveNorm(name=f"feed_forward_norm_{index}")(x, condition)
            hidden = nn.gelu(nn.Dense(4 * config.width, name=f"feed_forward_in_{index}")(normed))
            x = gated_residual(x, nn.Dense(config.width, name=f"feed_forward_out_{index}")(hidden), gate)
        x, _ = AdaptiveNorm(name="out_norm")(x, condition)
        return nn.Dense(self.token_width, kernel_init=nn.initializers.zeros_init(), name="tokens_out")(x)


def denoise(
    denoiser: Denoiser,
    variables: Params,
    x_t: Float[Array, "B L W"],
    t: Float[Array, " B"],
    prompt: Float[Array, "B E"],
    given: Float[Array, " B"],
) -> Float[Array, "B L W"]:
    """Predictions for a batch of regions."""

    def one(*row: jax.Array) -> Any:
        return denoiser.apply({"params": variables}, *row)

    return jax.vmap(one)(x_t, t, prompt, given)
