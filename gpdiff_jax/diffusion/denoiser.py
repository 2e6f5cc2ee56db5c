"""In: noisy tokens of one region, the time and the region's prompt. Out: what its objective asks for, by default v."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gpdiff_jax.diffusion.conditioning import STRATEGIES, AdaLNZero, Conditioner, check_conditioning, gated_residual
from gpdiff_jax.diffusion.objectives import check_objective
from gpdiff_jax.diffusion.products import attention, dense, has_fused_attention
from gpdiff_jax.errors import InputError, check_at_least, named
from gpdiff_jax.models.kinds import LAYER_KINDS
from gpdiff_jax.typing import Params
from gpdiff_jax.zoo.codec import Codec
from gpdiff_jax.zoo.tokens import mask_of

DTYPES = ("auto", "float32", "bfloat16", "float64")
_MOST_ROWS = 4096


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
    """Size of the Transformer, where the prompt enters, and what it predicts along which path from data to noise.

    `conditioning` is one of `conditioning.STRATEGIES`, `schedule` of `schedules.SCHEDULES`, `objective` of
    `objectives.OBJECTIVES`. `dtype` is what the layers compute in, one of `DTYPES`; "auto" is bfloat16 on an
    accelerator and float32 on a CPU, wherever the network is run. Parameters and predictions are float32 in any case,
    but with "float64", which needs JAX's x64 mode and serves comparisons.
    """

    width: int = 128
    layers: int = 3
    heads: int = 4
    prompt_bottleneck: int = 32
    conditioning: str = "adaptive_norm"
    schedule: str = "cosine"
    objective: str = "v"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        check_at_least(1, named(self, "width", "layers", "heads", "prompt_bottleneck"))
        if self.width % (2 * self.heads):
            raise InputError(f"`width` (={self.width}) must be a multiple of 2 x `heads` (={self.heads})")
        if self.conditioning not in STRATEGIES:
            raise InputError(f"`conditioning` must be one of {', '.join(STRATEGIES)}, got {self.conditioning!r}")
        if self.dtype not in DTYPES:
            raise InputError(f"`dtype` must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        check_objective(self.objective, self.schedule)

    @property
    def compute_dtype(self) -> np.dtype:
        """What the layers compute in on this process's devices."""
        on_cpu = jax.default_backend() == "cpu"
        name = self.dtype if self.dtype != "auto" else "float32" if on_cpu else "bfloat16"
        return jnp.dtype(name)


class Denoiser(nn.Module):
    """Transformer over the rows of one latent, its tokens; attention never runs over regions.

    Every token carries a learned embedding of its place, of its layer and of its layer's kind (`models.kinds`; "mixed"
    where the model names no kinds), so that it is known which weights feed which. Padding is neither read nor, where it
    fills a whole token, attended to; `filled` says how many leading entries of every token hold something, all where it
    is empty. Regions are leading axes. Only strategies that tell the parts of a prompt apart need which entries of it
    are spatial (`Prompts.spatial`); `make_denoiser` gives all of these.
    """

    config: DenoiserConfig
    layer_of_token: tuple[int, ...]
    token_width: int
    layer_kinds: tuple[str, ...] = ()
    spatial: tuple[int, ...] = ()
    filled: tuple[int, ...] = ()

    @nn.compact
    def __call__(
        self,
        x_t: Float[Array, "*B Z D"],
        t: Float[Array, "*B"],
        prompt: Float[Array, "*B E"],
        prompt_mask: Float[Array, "*B"],
    ) -> Float[Array, "*B Z D"]:
        """Returns the prediction for every region's latent; `prompt_mask` is 0 where the prompt is dropped."""
        config, count, dtype = self.config, len(self.layer_of_token), self.config.compute_dtype
        kinds = tuple(self.layer_kinds[layer] if self.layer_kinds else "mixed" for layer in self.layer_of_token)
        filled = self.filled or (self.token_width,) * count
        strategy = STRATEGIES[config.conditioning](config.heads, kinds, self.spatial, dtype)
        embed = Conditioner(config.width, config.prompt_bottleneck, strategy.embedded_parts(), name="condition")
        time_embedding, parts = (part.astype(dtype) for part in embed(t, prompt, prompt_mask))
        condition = strategy.condition(time_embedding, parts)
        initial = nn.initializers.normal(0.2)
        place = self.param("place_embedding", initial, (count, config.width))
        layer = self.param("layer_embedding", initial, (max(self.layer_of_token) + 1, config.width))
        kind = self.param("kind_embedding", initial, (len(LAYER_KINDS), config.width))
        kind_of_token = jnp.asarray([LAYER_KINDS.index(name) for name in kinds])
        position = place + layer[jnp.asarray(self.layer_of_token)] + kind[kind_of_token]
        if min(filled) < self.token_width:
            x_t = jnp.where(mask_of(filled, self.token_width) > 0, x_t, 0.0)
        attended_to = None
        if not all(filled):
            attended_to = nn.make_attention_mask(np.ones(count, bool), np.asarray(filled) > 0, dtype=jnp.bool_)
        x = dense(config.width, name="tokens_in")(x_t) + jnp.broadcast_to(position, (*x_t.shape[:-1], config.width))
        x = strategy.at_input(x.astype(dtype), parts)
        if attended_to is None and count % 2 and has_fused_attention(dtype):
            # Fused attention wants an even number of tokens: one more, which nobody reads.
            x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, 1), (0, 0)])
        added = strategy.before_layers(x, parts)
        for index in range(config.layers):
            x = x if added is None else x + added
            normed, gate = AdaLNZero(dtype, name=f"attention_norm_{index}")(x, condition)
            attended = attention(config.heads, dtype, name=f"attention_{index}", length=count)(normed, mask=attended_to)
            x = gated_residual(x, attended, gate)
            x = strategy.after_attention(x, condition, parts, index)
            normed, gate = AdaLNZero(dtype, name=f"feed_forward_norm_{index}")(x, condition)
            hidden = nn.gelu(dense(4 * config.width, dtype=dtype, name=f"feed_forward_in_{index}")(normed))
            x = gated_residual(x, dense(config.width, dtype=dtype, name=f"feed_forward_out_{index}")(hidden), gate)
        x, _ = AdaLNZero(dtype, name="out_norm")(x[..., :count, :], condition)
        tokens_out = dense(self.token_width, kernel_init=nn.initializers.zeros_init(), name="tokens_out")
        return tokens_out(x.astype(jnp.promote_types(dtype, jnp.float32)))


def make_denoiser(config: DenoiserConfig, codec: Codec, spatial: tuple[int, ...] = ()) -> Denoiser:
    """The network for the latents of a zoo and the prompts of its regions.

    Args:
      config: size, conditioning, schedule and objective.
      codec: says of every row of a latent its layer and kind, and how much of it is padding.
      spatial: 1 for every entry of a prompt that says where a region lies, 0 for those that say how it behaves
        (`Prompts.spatial`); needed by strategies that tell the two apart.

    Returns:
      The network, without variables.

    Raises:
      InputError: the strategy needs temporal and spatial entries of the prompt and one of them is missing, or the kinds
        of the model's layers and it does not give them; or there are more rows than attention can hold, or nothing in
        them.
    """
    check_conditioning(config.conditioning, spatial, codec.kinds)
    if len(codec.filled) > _MOST_ROWS:
        raise InputError(
            f"`token_width` (={codec.layout.width}) makes {len(codec.filled)} tokens, more than {_MOST_ROWS}; "
            "choose a larger one, or `components` above 0"
        )
    if not any(codec.filled):
        raise InputError(
            "the parameter vectors of the zoo are all the same, so there is nothing to learn; harvest longer"
        )
    return Denoiser(config, codec.layer_of_row, codec.width, codec.kinds, spatial, codec.filled)


def denoise(
    denoiser: Denoiser,
    variables: Params,
    x_t: Float[Array, "B Z D"],
    t: Float[Array, " B"],
    prompt: Float[Array, "B E"],
    prompt_mask: Float[Array, " B"],
) -> Float[Array, "B Z D"]:
    """Predictions for a batch of regions."""
    predictions: Any = denoiser.apply({"params": variables}, x_t, t, prompt, prompt_mask)
    return predictions


def in_parts(predict: Callable[..., jax.Array], rows: tuple[jax.Array, ...], side_by_side: int | None) -> jax.Array:
    """What a function says of a batch, leaves [B, ...]: so many rows at a time take less memory; None for all."""
    if side_by_side is None:
        return predict(*rows)
    return jax.lax.map(lambda row: predict(*(part[None] for part in row))[0], rows, batch_size=side_by_side)
