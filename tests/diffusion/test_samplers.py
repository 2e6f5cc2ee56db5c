"""In: velocities that are known in closed form. Out: samples with the distribution that they must have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.diffusion.samplers import ddim, guided
from gpdiff_jax.diffusion.schedules import cosine_level

_MEAN = np.array([1.5, -2.0, 0.5], np.float32)
_FACTOR = np.array([[0.8, 0.0, 0.0], [0.5, 0.3, 0.0], [-0.4, 0.2, 1.2]], np.float32)
_COVARIANCE = _FACTOR @ _FACTOR.T


def _velocity(x_t: jax.Array, t: jax.Array) -> jax.Array:
    """E[v | x_t] of a Gaussian: x0's posterior mean is mean + alpha C (alpha^2 C + sigma^2 I)^-1 (x_t - alpha mean)."""
    alpha, sigma = cosine_level(t)
    total = alpha**2 * _COVARIANCE + sigma**2 * jnp.eye(3)
    away = x_t - alpha * jnp.asarray(_MEAN)[None]
    x0 = jnp.asarray(_MEAN)[None] + alpha * jnp.linalg.solve(total, away.T).T @ jnp.asarray(_COVARIANCE)
    eps = sigma * jnp.linalg.solve(total, away.T).T
    return alpha * eps - sigma * x0


def test_ddim_turns_noise_into_the_gaussian_whose_velocity_it_follows():
    noise = jax.random.normal(jax.random.key(0), (4000, 3))
    samples = np.asarray(jax.jit(lambda x: ddim(_velocity, x, 200))(noise))
    # Without added noise the map is affine: the sample's own moments are carried over.
    np.testing.assert_allclose(samples.mean(axis=0), _MEAN, atol=0.06)
    np.testing.assert_allclose(np.cov(samples.T), _COVARIANCE, atol=0.1)
    design = np.concatenate([np.asarray(noise), np.ones((4000, 1))], axis=1)
    fitted = design @ np.linalg.lstsq(design, samples, rcond=None)[0]
    np.testing.assert_allclose(samples, fitted, atol=1e-3)


def test_more_steps_come_closer():
    noise = jax.random.normal(jax.random.key(1), (4000, 3))
    errors = []
    for steps in (4, 16, 64):
        samples = np.asarray(jax.jit(lambda x, n=steps: ddim(_velocity, x, n))(noise))
        errors.append(np.abs(np.cov(samples.T) - _COVARIANCE).max())
    assert errors[0] > errors[1] > errors[2]


def test_one_step_from_pure_noise_is_minus_the_velocity():
    noise = jax.random.normal(jax.random.key(2), (5, 3))

    def velocity_fn(x_t: jax.Array, t: jax.Array) -> jax.Array:
        assert t.shape == ()
        return jnp.sin(3.0 * x_t) + t

    np.testing.assert_allclose(ddim(velocity_fn, noise, 1), -(np.sin(3.0 * np.asarray(noise)) + 1.0), atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_sampler_that_knows_the_answer_returns_it(steps):
    noise, x0 = jax.random.normal(jax.random.key(3), (2, 4))

    def velocity_fn(x_t: jax.Array, t: jax.Array) -> jax.Array:
        level = cosine_level(t)
        return level.alpha * noise - level.sigma * x0

    np.testing.assert_allclose(ddim(velocity_fn, noise, steps), x0, atol=1e-5)


def test_guidance_goes_from_untold_over_told_beyond():
    told, untold = jnp.asarray([1.0, 5.0]), jnp.asarray([3.0, 1.0])
    np.testing.assert_array_equal(guided(told, untold, 0.0), untold)
    np.testing.assert_array_equal(guided(told, untold, 1.0), told)
    np.testing.assert_array_equal(guided(told, untold, 2.0), [-1.0, 9.0])
