"""In: a prompt and a diffusion time. Out: one vector, and the adaptive norm through which tokens feel it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def time_features(t: Float[Array, ""], width: int) -> Float[Array, " width"]:
    """Sines and cosines of the diffusion time at geometric frequencies (Vaswani et al., arXiv 1706.03762, 3.5).

    Args:
      t: time in [0, 1].
      width: even number of features.

    Returns:
      float32 [width].
    """
    frequencies = jnp.asarray(2 * np.pi * np.geomspace(0.25, 32.0, width // 2), jnp.float32)
    return jnp.concatenate([jnp.sin(t * frequencies), jnp.cos(t * frequencies)])


class Conditioner(nn.Module):
    """Embeds time and prompt; a dropped prompt is replaced by a learned vector, for classifier-free guidance."""

    width: int
    bottleneck: int

    @nn.compact
    def __call__(
        self, t: Float[Array, ""], prompt: Float[Array, " E"], given: Float[Array, ""]
    ) -> Float[Array, " width"]:
        """Returns the condition; `given` is 1 where the prompt is told, 0 where it is dropped."""
        hidden = nn.silu(nn.Dense(self.bottleneck, name="prompt_in")(prompt))
        told = nn.Dense(self.width, name="prompt_out")(hidden)
        null = self.param("prompt_null", nn.initializers.normal(0.02), (self.width,))
        step = nn.Dense(self.width, name="time_out")(
            nn.silu(nn.Dense(self.width, name="time_in")(time_features(t, self.width)))
        )
        return step + given * told + (1.0 - given) * null


class AdaptiveNorm(nn.Module):
    """Layer norm whose shift and scale, and the gate of the branch behind it, come from the condition.

    Peebles and Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748 (adaLN-Zero).
    """

    @nn.compact
    def __call__(
        self, x: Float[Array, "L width"], condition: Float[Array, " width"]
    ) -> tuple[Float[Array, "L width"], Float[Array, " width"]]:
        """Returns the modulated tokens and the gate of the branch."""
        modulation = nn.Dense(3 * x.shape[-1], kernel_init=nn.initializers.zeros_init(), name="modulation")
        shift, scale, gate = jnp.split(modulation(nn.silu(condition)), 3)
        normed = nn.LayerNorm(use_scale=False, use_bias=False, name="norm")(x)
        return normed * (1.0 + scale[None, :]) + shift[None, :], gate


def gated_residual(
    x: Float[Array, "L width"], branch: Float[Array, "L width"], gate: Float[Array, " width"]
) -> jax.Array:
    """x + gate * branch."""
    return x + gate[None, :] * branch
