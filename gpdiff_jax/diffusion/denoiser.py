"""In: noisy tokens of one region, the time and the region's prompt. Out: what its objective asks for, by default v."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gpdiff_jax.codec import Codec
from gpdiff_jax.diffusion.conditioning import STRATEGIES, AdaptiveNorm, Conditioner, check_conditioning, gated_residual
from gpdiff_jax.diffusion.kinds import layer_kind, spatial_columns
from gpdiff_jax.diffusion.objectives import check_objective
from gpdiff_jax.errors import InputError
from gpdiff_jax.typing import Params


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
    """Size of the Transformer, how it hears the prompt, and what it predicts along which path from data to noise.

    `conditioning` is one of `conditioning.STRATEGIES`, `schedule` of `schedules.SCHEDULES`, `objective` of
    `objectives.OBJECTIVES`.
    """

    width: int = 128
    layers: int = 3
    heads: int = 4
    prompt_bottleneck: int = 32
    conditioning: str = "adaptive_norm"
    schedule: str = "cosine"
    objective: str = "v"

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "prompt_bottleneck"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if self.width % (2 * self.heads):
            raise InputError(f"`width` (={self.width}) must be a multiple of 2 x `heads` (={self.heads})")
        if self.conditioning not in STRATEGIES:
            raise InputError(f"`conditioning` must be one of {', '.join(STRATEGIES)}, got {self.conditioning!r}")
        check_objective(self.objective, self.schedule)


class Denoiser(nn.Module):
    """Transformer over the tokens of one parameter vector; attention never runs over regions.

    Every token carries a learned code of its place and of its layer. Written for one region; batch by `vmap`. Only
    strategies that tell the parts of a prompt apart need the kinds of the layers (`kinds.layer_kind`) and which entries
    of the prompt are spatial (`kinds.spatial_columns`); `make_denoiser` gives both.
    """

    config: DenoiserConfig
    layer_of_token: tuple[int, ...]
    token_width: int
    layer_kinds: tuple[str, ...] = ()
    spatial: tuple[int, ...] = ()

    @nn.compact
    def __call__(
        self, x_t: Float[Array, "L W"], t: Float[Array, ""], prompt: Float[Array, " E"], given: Float[Array, ""]
    ) -> Float[Array, "L W"]:
        """Returns the prediction for one region's tokens; `given` is 0 where the prompt is dropped."""
        config, count = self.config, len(self.layer_of_token)
        kinds = tuple(self.layer_kinds[layer] for layer in self.layer_of_token) if self.layer_kinds else ()
        strategy = STRATEGIES[config.conditioning](config.heads, kinds, self.spatial)
        embed = Conditioner(config.width, config.prompt_bottleneck, strategy.parts(), name="condition")
        step, told = embed(t, prompt, given)
        condition = strategy.condition(step, told)
        code = nn.initializers.normal(0.2)
        place = self.param("place_code", code, (count, config.width))
        layer = self.param("layer_code", code, (max(self.layer_of_token) + 1, config.width))
        x = nn.Dense(config.width, name="tokens_in")(x_t) + place + layer[jnp.asarray(self.layer_of_token)]
        x = strategy.at_input(x, told)
        answer = strategy.answer(x, told)
        for index in range(config.layers):
            x = x if answer is None else x + answer
            normed, gate = AdaptiveNorm(name=f"attention_norm_{index}")(x, condition)
            attended = nn.MultiHeadDotProductAttention(config.heads, name=f"attention_{index}")(normed)
            x = gated_residual(x, attended, gate)
            x = strategy.after_attention(x, condition, told, index)
            normed, gate = AdaptiveNorm(name=f"feed_forward_norm_{index}")(x, condition)
            hidden = nn.gelu(nn.Dense(4 * config.width, name=f"feed_forward_in_{index}")(normed))
            x = gated_residual(x, nn.Dense(config.width, name=f"feed_forward_out_{index}")(hidden), gate)
        x, _ = AdaptiveNorm(name="out_norm")(x, condition)
        return nn.Dense(self.token_width, kernel_init=nn.initializers.zeros_init(), name="tokens_out")(x)


def make_denoiser(config: DenoiserConfig, codec: Codec, prompt_names: tuple[str, ...]) -> Denoiser:
    """The network for the codes of a zoo and the prompts of its regions.

    Args:
      config: size, conditioning, schedule and objective.
      codec: names the layer of every code.
      prompt_names: of the entries of a prompt.

    Returns:
      The network, without variables.

    Raises:
      InputError: the strategy needs temporal and spatial entries of the prompt and one of them is missing.
    """
    spatial = spatial_columns(prompt_names)
    check_conditioning(config.conditioning, spatial)
    kinds = tuple(layer_kind(name) for name in codec.layout.layers)
    return Denoiser(config, codec.layer_of_code, codec.mask().shape[1], kinds, spatial)


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
