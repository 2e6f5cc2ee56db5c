"""In: what a network predicts at a noise level. Out: the clean and the noise part of x_t, and the weight of an error.

Four objectives: the velocity v = alpha eps - sigma x0 of a schedule that preserves variance, the noise eps, the clean
x0, and the flow's velocity eps - x0. Each pair of x_t and a prediction determines x0 and eps exactly, but for eps where
no signal is left.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gpdiff_jax.diffusion.schedules import SCHEDULES, NoiseLevel
from gpdiff_jax.errors import InputError

OBJECTIVES = ("v", "eps", "x0", "flow")
_SIGNAL_AT_THE_END = ("linear",)
_LEAST_NOISE = 1e-6


class Denoised(NamedTuple):
    """The two parts that x_t is made of, as far as a network can tell: x_t = alpha x0 + sigma eps."""

    x0: jax.Array
    eps: jax.Array


def check_objective(objective: str, schedule: str) -> None:
    """Raises `InputError` for a name that does not exist, and for an objective that a schedule leaves undefined.

    Args:
      objective: one of `OBJECTIVES`.
      schedule: one of `SCHEDULES`.

    Raises:
      InputError: an unknown name; eps where the schedule ends without signal, so that noise tells nothing of x0; v
        where variance is not preserved.
    """
    if objective not in OBJECTIVES:
        raise InputError(f"`objective` must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    if schedule not in SCHEDULES:
        raise InputError(f"`schedule` must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if objective == "eps" and schedule not in _SIGNAL_AT_THE_END:
        raise InputError(
            f"`objective` 'eps' is undefined where schedule {schedule!r} ends without signal; use 'v', 'x0' or 'flow', "
            "or schedule 'linear'"
        )
    if objective == "v" and schedule == "rectified_flow":
        raise InputError("`objective` 'v' needs a schedule that preserves variance, got 'rectified_flow'; use 'flow'")


def target(objective: str, level: NoiseLevel, x0: Float[Array, "*X"], eps: Float[Array, "*X"]) -> Float[Array, "*X"]:
    """What the network should predict.

    Args:
      objective: one of `OBJECTIVES`.
      level: amplitudes, shaped like `x0` or scalar.
      x0: clean.
      eps: noise.

    Returns:
      alpha eps - sigma x0 (Salimans and Ho, arXiv 2202.00512, appendix D), eps, x0, or eps - x0.
    """
    if objective == "v":
        return level.alpha * eps - level.sigma * x0
    if objective == "eps":
        return eps
    return x0 if objective == "x0" else eps - x0


def denoised(objective: str, level: NoiseLevel, x_t: Float[Array, "*X"], prediction: Float[Array, "*X"]) -> Denoised:
    """The clean and the noise part of x_t, from x_t and a prediction; exact for an exact one.

    Args:
      objective: one of `OBJECTIVES`.
      level: amplitudes, shaped like `x_t` or scalar.
      x_t: noisy.
      prediction: the network's answer.

    Returns:
      x0 and eps. With objective x0, the eps of t = 0, where x_t holds no noise, is of no meaning.
    """
    alpha, sigma = level
    if objective == "v":
        return Denoised(alpha * x_t - sigma * prediction, sigma * x_t + alpha * prediction)
    if objective == "eps":
        return Denoised((x_t - sigma * prediction) / alpha, prediction)
    if objective == "x0":
        return Denoised(prediction, (x_t - alpha * prediction) / jnp.maximum(sigma, _LEAST_NOISE))
    return Denoised((x_t - sigma * prediction) / (alpha + sigma), (x_t + alpha * prediction) / (alpha + sigma))


def min_snr_weight(objective: str, level: NoiseLevel, gamma: float) -> Float[Array, "*X"]:
    """Weight of the squared error of a prediction (Hang et al., arXiv 2303.09556, 3.4).

    For x0 it is min(snr, gamma), snr = alpha^2 / sigma^2. Seen through another objective the same error of x0 is snr
    (eps), 1 / sigma^2 (v) or ((alpha + sigma) / sigma)^2 (flow) times as large, which the weight takes out again:
    min(snr, gamma) / snr for eps, min(snr, gamma) / (snr + 1) for v. Where no signal is left the weight is 0; there
    only the functional loss teaches.

    Args:
      objective: one of `OBJECTIVES`.
      level: amplitudes.
      gamma: the largest weight of an error of x0; the paper's is 5.

    Returns:
      Weights, shaped like the level.
    """
    alpha, sigma = level
    power = jnp.minimum(jnp.square(alpha), gamma * jnp.square(sigma))
    if objective == "v":
        return power / (jnp.square(alpha) + jnp.square(sigma))
    if objective == "eps":
        return power / jnp.square(alpha)
    if objective == "x0":
        return jnp.minimum(jnp.square(alpha / jnp.maximum(sigma, _LEAST_NOISE)), gamma)
    return power / jnp.square(alpha + sigma)
