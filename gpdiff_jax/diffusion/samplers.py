"""In: a function that parts x_t into signal and noise, and noise. Out: clean samples, by the name of a sampler.

All go from t = 1 to t = 0 in equal steps of time, one evaluation each, scanned; any schedule goes with any of them, but
for Euler's method, which is the rectified flow's.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gpdiff_jax.diffusion.objectives import Denoised
from gpdiff_jax.diffusion.schedules import SCHEDULES, Schedule
from gpdiff_jax.errors import InputError

DenoiseFn = Callable[[Float[Array, "*X"], Float[Array, ""]], Denoised]  # of x_t and t


def _times(steps: int) -> tuple[jax.Array, jax.Array]:
    """Where every step begins and ends."""
    times = jnp.linspace(1.0, 0.0, steps + 1, dtype=jnp.float32)
    return times[:-1], times[1:]


def ddim(denoise_fn: DenoiseFn, schedule: Schedule, noise: Float[Array, "*X"], steps: int) -> Float[Array, "*X"]:
    """DDIM without added noise (Song, Meng, Ermon, arXiv 2010.02502, eq. 12 with sigma = 0).

    Args:
      denoise_fn: (x_t, t) to its clean and its noise part.
      schedule: of the levels.
      noise: x at t = 1.
      steps: number of evaluations.

    Returns:
      x at t = 0.
    """

    def step(x_t: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        now, then = bounds
        parts, target = denoise_fn(x_t, now), schedule(then)
        return target.alpha * parts.x0 + target.sigma * parts.eps, None

    return jax.lax.scan(step, noise, _times(steps))[0]


def ddpm(
    denoise_fn: DenoiseFn,
    schedule: Schedule,
    noise: Float[Array, "*X"],
    steps: int,
    draw: Callable[[jax.Array], Float[Array, "*X"]],
) -> Float[Array, "*X"]:
    """Ancestral sampling (Ho et al., arXiv 2006.11239, eq. 6 and 7, between any two times).

    The posterior of x_s given x_t and x0 has the mean alpha_s x0 + sigma_s r eps and the deviation
    sigma_s sqrt(1 - r^2), where r = alpha_t sigma_s / (alpha_s sigma_t).

    Args:
      denoise_fn: (x_t, t) to its clean and its noise part.
      schedule: of the levels.
      noise: x at t = 1.
      steps: number of evaluations.
      draw: from the index of a step to standard normal noise, shaped like x.

    Returns:
      x at t = 0.
    """

    def step(x_t: jax.Array, bounds: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        now, then, index = bounds
        parts, level, target = denoise_fn(x_t, now), schedule(now), schedule(then)
        kept = level.alpha * target.sigma / (target.alpha * level.sigma)
        fresh = jnp.sqrt(jnp.maximum(1.0 - jnp.square(kept), 0.0))
        return target.alpha * parts.x0 + target.sigma * (kept * parts.eps + fresh * draw(index)), None

    return jax.lax.scan(step, noise, (*_times(steps), jnp.arange(steps)))[0]


def dpm_solver(denoise_fn: DenoiseFn, schedule: Schedule, noise: Float[Array, "*X"], steps: int) -> Float[Array, "*X"]:
    """DPM-Solver++(2M): second order in log(alpha / sigma), from two evaluations (Lu et al., arXiv 2211.01095, alg. 2).

    The first and the last step, where that logarithm may be infinite, are of first order; so is the second where the
    first came from pure noise.

    Args:
      denoise_fn: (x_t, t) to its clean and its noise part.
      schedule: of the levels.
      noise: x at t = 1.
      steps: number of evaluations.

    Returns:
      x at t = 0.
    """
    begins, ends = _times(steps)
    level = schedule(jnp.append(begins, ends[-1]))
    width = jnp.diff(jnp.log(level.alpha) - jnp.log(level.sigma))
    ahead = jnp.append(0.0, width[1:] / (2.0 * width[:-1]))
    ahead = jnp.where(jnp.arange(steps) == steps - 1, 0.0, ahead)

    def step(
        carry: tuple[jax.Array, jax.Array], bounds: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        (x_t, before), (now, then, ahead) = carry, bounds
        x0, level, target = denoise_fn(x_t, now).x0, schedule(now), schedule(then)
        shrunk = target.sigma / level.sigma
        pull = target.alpha - level.alpha * shrunk
        return (shrunk * x_t + pull * (x0 + ahead * (x0 - before)), x0), None

    return jax.lax.scan(step, (noise, jnp.zeros_like(noise)), (begins, ends, ahead))[0][0]


def euler(denoise_fn: DenoiseFn, noise: Float[Array, "*X"], steps: int) -> Float[Array, "*X"]:
    """Euler's method along the rectified flow, whose velocity is eps - x0 (Liu, Gong, Liu, arXiv 2209.03003, eq. 1).

    Args:
      denoise_fn: (x_t, t) to its clean and its noise part, where x_t = (1 - t) x0 + t eps.
      noise: x at t = 1.
      steps: number of evaluations.

    Returns:
      x at t = 0.
    """

    def step(x_t: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        now, then = bounds
        parts = denoise_fn(x_t, now)
        return x_t + (then - now) * (parts.eps - parts.x0), None

    return jax.lax.scan(step, noise, _times(steps))[0]


SAMPLERS = ("ddim", "ddpm", "dpm_solver", "euler")


def check_sampler(sampler: str, schedule: str) -> None:
    """Raises `InputError` for a name that does not exist, and for Euler's method on another path than the flow's."""
    if sampler not in SAMPLERS:
        raise InputError(f"`sampler` must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if sampler == "euler" and schedule != "rectified_flow":
        raise InputError(f"`sampler` 'euler' needs schedule 'rectified_flow', got {schedule!r}; use 'ddim'")


def sample(
    sampler: str,
    schedule: str,
    denoise_fn: DenoiseFn,
    noise: Float[Array, "*X"],
    steps: int,
    draw: Callable[[jax.Array], Float[Array, "*X"]],
) -> Float[Array, "*X"]:
    """Samples by the name of a sampler and of a schedule.

    Args:
      sampler: one of `SAMPLERS`.
      schedule: one of `SCHEDULES`.
      denoise_fn: (x_t, t) to its clean and its noise part.
      noise: x at t = 1.
      steps: number of evaluations.
      draw: from the index of a step to standard normal noise, shaped like x; only ddpm asks.

    Returns:
      x at t = 0.
    """
    level = SCHEDULES[schedule]
    if sampler == "ddpm":
        return ddpm(denoise_fn, level, noise, steps, draw)
    if sampler == "euler":
        return euler(denoise_fn, noise, steps)
    return {"ddim": ddim, "dpm_solver": dpm_solver}[sampler](denoise_fn, level, noise, steps)


def guided(
    conditional: Float[Array, "*X"], unconditional: Float[Array, "*X"], guidance: Float[Array, ""] | float
) -> Float[Array, "*X"]:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): 0 ignores the prompt, above 1 exaggerates it."""
    return unconditional + guidance * (conditional - unconditional)
