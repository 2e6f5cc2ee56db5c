"""In: a velocity function and noise. Out: clean samples, in few deterministic steps."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gpdiff_jax.diffusion.schedules import cosine_level, eps_from_velocity, x0_from_velocity


def ddim(
    velocity_fn: Callable[[Float[Array, "*X"], Float[Array, ""]], Float[Array, "*X"]],
    noise: Float[Array, "*X"],
    steps: int,
) -> Float[Array, "*X"]:
    """DDIM without added noise (Song, Meng, Ermon, arXiv 2010.02502, eq. 12 with sigma = 0).

    Args:
      velocity_fn: (x_t, t) to v.
      noise: x at t = 1.
      steps: number of evaluations.

    Returns:
      x at t = 0.
    """
    times = jnp.linspace(1.0, 0.0, steps + 1, dtype=jnp.float32)

    def step(x_t: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        now, then = bounds
        v = velocity_fn(x_t, now)
        level, target = cosine_level(now), cosine_level(then)
        return target.alpha * x0_from_velocity(level, x_t, v) + target.sigma * eps_from_velocity(level, x_t, v), None

    return jax.lax.scan(step, noise, (times[:-1], times[1:]))[0]


def guided(
    told: Float[Array, "*X"], untold: Float[Array, "*X"], guidance: Float[Array, ""] | float
) -> Float[Array, "*X"]:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): 0 ignores the prompt, above 1 exaggerates it."""
    return untold + guidance * (told - untold)
