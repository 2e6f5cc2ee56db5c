"""In: a time t in [0, 1]. Out: how much signal and noise a token holds then, and the way between x0, eps and v.

Variance preserving: x_t = alpha(t) x0 + sigma(t) eps, alpha^2 + sigma^2 = 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class NoiseLevel(NamedTuple):
    """Amplitudes of signal and noise."""

    alpha: jax.Array
    sigma: jax.Array


def cosine_level(t: Float[Array, "*X"]) -> NoiseLevel:
    """The cosine schedule without offset: alpha = cos(pi t / 2).

    It ends at exactly zero signal, so that sampling may begin from pure noise (Lin et al., arXiv 2305.08891).

    Args:
      t: time, 0 (data) to 1 (noise).

    Returns:
      alpha and sigma, shaped like `t`.
    """
    # cos(pi / 2) is not 0 in floating point.
    alpha = jnp.where(t >= 1.0, 0.0, jnp.cos(0.5 * jnp.pi * t))
    return NoiseLevel(alpha, jnp.sin(0.5 * jnp.pi * t))


def add_noise(level: NoiseLevel, x0: Float[Array, "*X"], eps: Float[Array, "*X"]) -> Float[Array, "*X"]:
    """x_t = alpha x0 + sigma eps."""
    return level.alpha * x0 + level.sigma * eps


def velocity(level: NoiseLevel, x0: Float[Array, "*X"], eps: Float[Array, "*X"]) -> Float[Array, "*X"]:
    """v = alpha eps - sigma x0 (Salimans and Ho, arXiv 2202.00512, appendix D)."""
    return level.alpha * eps - level.sigma * x0


def x0_from_velocity(level: NoiseLevel, x_t: Float[Array, "*X"], v: Float[Array, "*X"]) -> Float[Array, "*X"]:
    """x0 = alpha x_t - sigma v."""
    return level.alpha * x_t - level.sigma * v


def eps_from_velocity(level: NoiseLevel, x_t: Float[Array, "*X"], v: Float[Array, "*X"]) -> Float[Array, "*X"]:
    """eps = sigma x_t + alpha v."""
    return level.sigma * x_t + level.alpha * v
