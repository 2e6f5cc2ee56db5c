"""In: a prompt and a diffusion time. Out: vectors of both, and the five strategies by which they condition tokens.

The strategies are those of Yuan et al. (arXiv 2402.11922). The time enters all of them by the adaptive norm; they
differ in where the prompt enters:

    pre_conditioning   added to every token at the input
    inductive_bias     the same, its temporal part to temporal tokens and its spatial part to graph tokens
    pre_adaptive       every token attends to the parts of the prompt; what it reads is added before each layer
    post_adaptive      the same, read and added in each layer after self-attention
    adaptive_norm      beside the time, in shift, scale and gate of every norm; the default

Attention to the parts of a prompt, as that over tokens, stays within one region; regions are leading axes.
"""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gpdiff_jax.diffusion.products import attention, dense
from gpdiff_jax.errors import InputError

# Weights of the temporal and the spatial part of the prompt, by the kind of a token's layer.
_PARTS_OF_KIND = {"temporal": (1.0, 0.0), "graph": (0.0, 1.0), "output": (1.0, 0.0), "mixed": (1.0, 1.0)}


def time_features(t: Float[Array, "*B"], width: int) -> Float[Array, "*B width"]:
    """Sines and cosines of the diffusion time at geometric frequencies (Vaswani et al., arXiv 1706.03762, 3.5).

    Args:
      t: time in [0, 1].
      width: even number of features.

    Returns:
      float32 [*B, width].
    """
    frequencies = jnp.asarray(2 * np.pi * np.geomspace(0.25, 32.0, width // 2), jnp.float32)
    angles = jnp.multiply.outer(t, frequencies)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class Conditioner(nn.Module):
    """Embeds time and the parts of a prompt; a dropped prompt is replaced by learned vectors, for guidance without it.

    `parts` holds for each part its name and its columns of the prompt, or None for all of them.
    """

    width: int
    bottleneck: int
    parts: tuple[tuple[str, tuple[int, ...] | None], ...] = (("prompt", None),)

    @nn.compact
    def __call__(
        self, t: Float[Array, "*B"], prompt: Float[Array, "*B E"], prompt_mask: Float[Array, "*B"]
    ) -> tuple[Float[Array, "*B width"], Float[Array, "*B parts width"]]:
        """Returns the vectors of time and of the parts; `prompt_mask` is 0 where the prompt is dropped, else 1."""
        rows = []
        for name, columns in self.parts:
            part = prompt if columns is None else prompt[..., jnp.asarray(columns)]
            hidden = nn.silu(dense(self.bottleneck, name=f"{name}_in")(part))
            embedded = dense(self.width, name=f"{name}_out")(hidden)
            null = self.param(f"{name}_null", nn.initializers.normal(0.02), (self.width,))
            rows.append(prompt_mask[..., None] * embedded + jnp.multiply.outer(1.0 - prompt_mask, null))
        time_embedding = dense(self.width, name="time_out")(
            nn.silu(dense(self.width, name="time_in")(time_features(t, self.width)))
        )
        return time_embedding, jnp.stack(rows, axis=-2)


class AdaLNZero(nn.Module):
    """Layer norm whose shift and scale, and the gate of the branch behind it, come from the condition.

    Peebles and Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748 (adaLN-Zero). Its moments are
    at least float32 whatever `dtype` it computes in.
    """

    dtype: np.dtype = np.dtype(np.float32)

    @nn.compact
    def __call__(
        self, x: Float[Array, "*B Z width"], condition: Float[Array, "*B width"]
    ) -> tuple[Float[Array, "*B Z width"], Float[Array, "*B width"]]:
        """Returns the modulated tokens and the gate of the branch."""
        zeros = nn.initializers.zeros_init()
        modulation = dense(3 * x.shape[-1], dtype=self.dtype, kernel_init=zeros, name="modulation")
        shift, scale, gate = jnp.split(modulation(nn.silu(condition))[..., None, :], 3, axis=-1)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        norm = nn.LayerNorm(dtype=wide, use_scale=False, use_bias=False, name="norm")
        normed = norm(x.astype(wide)).astype(self.dtype)
        return normed * (1.0 + scale) + shift, gate[..., 0, :]


def gated_residual(
    x: Float[Array, "*B Z width"], branch: Float[Array, "*B Z width"], gate: Float[Array, "*B width"]
) -> jax.Array:
    """x + gate * branch."""
    return x + gate[..., None, :] * branch


@dataclasses.dataclass(frozen=True)
class Strategy:
    """Where a prompt may enter the denoiser; each subclass overrides one of the hooks. Made and called within it.

    `token_kinds` holds the layer's kind of every token, a row of the latent, `spatial` a 1 for every spatial entry of
    the prompt and a 0 for the others; tokens and embedded parts come in `dtype`.
    """

    heads: int
    token_kinds: tuple[str, ...]
    spatial: tuple[int, ...]
    dtype: np.dtype

    def embedded_parts(self) -> tuple[tuple[str, tuple[int, ...] | None], ...]:
        """Which parts of the prompt are embedded; here the whole as one."""
        return (("prompt", None),)

    def condition(
        self, time_embedding: Float[Array, "*B width"], parts: Float[Array, "*B parts width"]
    ) -> Float[Array, "*B width"]:
        """The condition of the adaptive norms; here the time alone."""
        del parts
        return time_embedding

    def at_input(
        self, x: Float[Array, "*B Z width"], parts: Float[Array, "*B parts width"]
    ) -> Float[Array, "*B Z width"]:
        """The tokens before the first layer."""
        del parts
        return x

    def before_layers(
        self, x: Float[Array, "*B Z width"], parts: Float[Array, "*B parts width"]
    ) -> Float[Array, "*B Z width"] | None:
        """What is added before each layer, made once from the tokens at the input; here nothing."""
        del x, parts

    def after_attention(
        self,
        x: Float[Array, "*B Z width"],
        condition: Float[Array, "*B width"],
        parts: Float[Array, "*B parts width"],
        layer: int,
    ) -> Float[Array, "*B Z width"]:
        """The tokens between self-attention and feed-forward."""
        del condition, parts, layer
        return x


class PreConditioning(Strategy):
    """The whole prompt is added to every token at the input."""

    def at_input(
        self, x: Float[Array, "*B Z width"], parts: Float[Array, "*B parts width"]
    ) -> Float[Array, "*B Z width"]:
        """The prompt added."""
        return x + parts


class InductiveBias(Strategy):
    """To each token the part of the prompt that concerns it is added at the input.

    Temporal and output tokens take the temporal part, graph tokens the spatial part, and tokens of a mixed layer both.
    A part that no token takes, as the spatial one of a model without a graph, is not embedded.
    """

    def _parts_of_token(self) -> np.ndarray:
        return np.asarray([_PARTS_OF_KIND[kind] for kind in self.token_kinds], np.float32)

    def embedded_parts(self) -> tuple[tuple[str, tuple[int, ...] | None], ...]:
        """Those parts that some token takes."""
        return tuple(
            part for index, part in enumerate(_two_parts(self.spatial)) if self._parts_of_token()[:, index].any()
        )

    def at_input(
        self, x: Float[Array, "*B Z width"], parts: Float[Array, "*B parts width"]
    ) -> Float[Array, "*B Z width"]:
        """Each token with its part added."""
        weights = self._parts_of_token()
        return x + jnp.einsum("lp,...pw->...lw", weights[:, weights.any(axis=0)].astype(self.dtype), parts)


class PreAdaptive(Strategy):
    """Every token attends to the parts of the prompt once; what it reads is added before each layer."""

    def embedded_parts(self) -> tuple[tuple[str, tuple[int, ...] | None], ...]:
        """The temporal and the spatial part."""
        return _two_parts(self.spatial)

    def before_layers(
        self, x: Float[Array, "*B Z width"], parts: Float[Array, "*B parts width"]
    ) -> Float[Array, "*B Z width"] | None:
        """What the tokens at the input read out of the parts."""
        return attention(self.heads, self.dtype, name="prompt_attention")(x, parts)


class PostAdaptive(Strategy):
    """Every token attends to the parts of the prompt in each layer, after it has attended to the other tokens."""

    def embedded_parts(self) -> tuple[tuple[str, tuple[int, ...] | None], ...]:
        """The temporal and the spatial part."""
        return _two_parts(self.spatial)

    def after_attention(
        self,
        x: Float[Array, "*B Z width"],
        condition: Float[Array, "*B width"],
        parts: Float[Array, "*B parts width"],
        layer: int,
    ) -> Float[Array, "*B Z width"]:
        """The tokens with what they read of the prompt added."""
        normed, gate = AdaLNZero(self.dtype, name=f"prompt_norm_{layer}")(x, condition)
        read = attention(self.heads, self.dtype, name=f"prompt_attention_{layer}")(normed, parts)
        return gated_residual(x, read, gate)


class AdaptiveNorm(Strategy):
    """The prompt beside the time, in shift, scale and gate of every norm."""

    def condition(
        self, time_embedding: Float[Array, "*B width"], parts: Float[Array, "*B parts width"]
    ) -> Float[Array, "*B width"]:
        """The sum of time and prompt."""
        return time_embedding + parts[..., 0, :]


_TWO_PART_STRATEGIES = ("inductive_bias", "pre_adaptive", "post_adaptive")
STRATEGIES: dict[str, type[Strategy]] = {
    "pre_conditioning": PreConditioning,
    "inductive_bias": InductiveBias,
    "pre_adaptive": PreAdaptive,
    "post_adaptive": PostAdaptive,
    "adaptive_norm": AdaptiveNorm,
}


def check_conditioning(conditioning: str, spatial: tuple[int, ...], layer_kinds: Sequence[str] | None = None) -> None:
    """Raises `InputError` where a strategy needs what a prompt or a model does not say.

    Args:
      conditioning: one of `STRATEGIES`.
      spatial: 1 where an entry of the prompt, or a kind of entries, is spatial, else 0.
      layer_kinds: of the model's layers; None where the model is not known yet.

    Raises:
      InputError: it needs both parts of a prompt and one is missing, or kinds of layers and all are "mixed".
    """
    if conditioning == "inductive_bias" and layer_kinds is not None and set(layer_kinds) == {"mixed"}:
        raise InputError(
            f"`conditioning` {conditioning!r} needs to know which layers of the model work on time, on the graph and "
            "on the output; say it by `Model(..., kinds=...)`, or use 'adaptive_norm'"
        )
    if conditioning in _TWO_PART_STRATEGIES and len(set(spatial)) < 2:
        held = "no entry" if not spatial else "spatial entries alone" if spatial[0] else "temporal entries alone"
        raise InputError(
            f"`conditioning` {conditioning!r} needs a prompt of temporal and spatial entries, got {held}; "
            "add a part to the prompt or use 'adaptive_norm'"
        )


def _two_parts(spatial: tuple[int, ...]) -> tuple[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...]]]:
    of_space = tuple(column for column, flag in enumerate(spatial) if flag)
    of_time = tuple(column for column, flag in enumerate(spatial) if not flag)
    return ("temporal", of_time), ("spatial", of_space)
