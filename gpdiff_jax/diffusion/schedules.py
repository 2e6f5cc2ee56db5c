"""In: a time t in [0, 1]. Out: how much signal and how much noise a token holds then, by the name of a schedule.

x_t = alpha(t) x0 + sigma(t) eps, from data at t = 0 to noise at t = 1. All but the rectified flow preserve variance:
alpha^2 + sigma^2 = 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gpdiff_jax.errors import InputError

_LEAST_BETA, _MOST_BETA = 0.1, 20.0  # a thousand times those of one of the thousand steps: 1e-4 and 0.02


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


def linear_level(t: Float[Array, "*X"]) -> NoiseLevel:
    """The limit of many steps with linearly growing beta (Ho et al., arXiv 2006.11239).

    log alpha = -t^2 (20 - 0.1) / 4 - 0.1 t / 2 (Song et al., arXiv 2011.13456, eq. 33). A signal of alpha = 0.0066 is
    left at the end, though sampling begins from pure noise.

    Args:
      t: time, 0 (data) to 1 (noise).

    Returns:
      alpha and sigma, shaped like `t`.
    """
    log_alpha = _linear_log_alpha(t)
    return NoiseLevel(jnp.exp(log_alpha), jnp.sqrt(-jnp.expm1(2.0 * log_alpha)))


def zero_terminal_snr_level(t: Float[Array, "*X"]) -> NoiseLevel:
    """The linear schedule, shifted and scaled so that no signal is left at the end (Lin et al., arXiv 2305.08891, 3.1).

    Args:
      t: time, 0 (data) to 1 (noise).

    Returns:
      alpha and sigma, shaped like `t`.
    """
    # What is missing to 1, which keeps its digits near the data, where alpha has lost them.
    missing = jnp.expm1(_linear_log_alpha(t)) / jnp.expm1(_linear_log_alpha(jnp.ones_like(t)))
    missing = jnp.where(t >= 1.0, 1.0, missing)
    return NoiseLevel(1.0 - missing, jnp.sqrt(missing * (2.0 - missing)))


def _linear_log_alpha(t: Float[Array, "*X"]) -> Float[Array, "*X"]:
    return -0.25 * jnp.square(t) * (_MOST_BETA - _LEAST_BETA) - 0.5 * t * _LEAST_BETA


def rectified_flow_level(t: Float[Array, "*X"]) -> NoiseLevel:
    """The straight line from data to noise: x_t = (1 - t) x0 + t eps (Liu, Gong, Liu, arXiv 2209.03003).

    Args:
      t: time, 0 (data) to 1 (noise).

    Returns:
      alpha and sigma, shaped like `t`.
    """
    return NoiseLevel(1.0 - t, t)


Schedule = Callable[[Float[Array, "*X"]], NoiseLevel]
SCHEDULES: dict[str, Schedule] = {
    "cosine": cosine_level,
    "linear": linear_level,
    "zero_terminal_snr": zero_terminal_snr_level,
    "rectified_flow": rectified_flow_level,
}


def make_schedule(name: str) -> Schedule:
    """The schedule of that name.

    Raises:
      InputError: there is none.
    """
    if name not in SCHEDULES:
        raise InputError(f"`schedule` must be one of {', '.join(SCHEDULES)}, got {name!r}")
    return SCHEDULES[name]


def add_noise(level: NoiseLevel, x0: Float[Array, "*X"], eps: Float[Array, "*X"]) -> Float[Array, "*X"]:
    """x_t = alpha x0 + sigma eps."""
    return level.alpha * x0 + level.sigma * eps
