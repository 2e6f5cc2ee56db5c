"""In: times and random signals. Out: the identities that hold between x0, eps, x_t and v at every noise level."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.diffusion.schedules import (
    add_noise,
    cosine_level,
    eps_from_velocity,
    velocity,
    x0_from_velocity,
)

_TIMES = (0.0, 1e-3, 0.2, 0.5, 0.77, 0.999, 1.0)


def test_signal_and_noise_have_unit_power_together_and_the_ends_are_exact():
    times = jnp.linspace(0.0, 1.0, 1001)
    for level in (cosine_level(times), jax.jit(cosine_level)(times)):
        np.testing.assert_allclose(np.square(level.alpha) + np.square(level.sigma), 1.0, atol=1e-6)
        assert (np.diff(level.alpha) < 0).all() and (np.diff(level.sigma) >= 0).all()
        assert level.alpha[0] == 1 and level.sigma[0] == 0
        # Exactly no signal at the end: sampling begins from pure noise.
        assert level.alpha[-1] == 0 and level.sigma[-1] == 1
    np.testing.assert_allclose(cosine_level(times).alpha, np.cos(np.pi * np.linspace(0, 1, 1001) / 2), atol=1e-6)


@pytest.mark.parametrize("time", _TIMES)
def test_velocity_leads_back_to_signal_and_noise(time):
    x0, eps = jax.random.normal(jax.random.key(0), (2, 50))
    level = cosine_level(jnp.full(50, time, jnp.float32))
    x_t = add_noise(level, x0, eps)
    v = velocity(level, x0, eps)
    np.testing.assert_allclose(x0_from_velocity(level, x_t, v), x0, atol=2e-6)
    np.testing.assert_allclose(eps_from_velocity(level, x_t, v), eps, atol=2e-6)
    # v is the derivative of x_t along the circle: x_t' = -sigma x0 + alpha eps in units of the angle.
    later = cosine_level(jnp.full(50, min(time, 0.99) + 1e-2, jnp.float32))
    earlier = cosine_level(jnp.full(50, min(time, 0.99) - 0.0, jnp.float32))
    slope = (add_noise(later, x0, eps) - add_noise(earlier, x0, eps)) / (0.5 * np.pi * 1e-2)
    np.testing.assert_allclose(slope, velocity(earlier, x0, eps), atol=5e-2)


def test_at_the_ends_velocity_is_the_noise_and_minus_the_signal():
    x0, eps = jax.random.normal(jax.random.key(1), (2, 8))
    np.testing.assert_array_equal(velocity(cosine_level(jnp.zeros(8)), x0, eps), eps)
    np.testing.assert_array_equal(velocity(cosine_level(jnp.ones(8)), x0, eps), -x0)
