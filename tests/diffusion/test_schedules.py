"""In: times. Out: signal and noise of every schedule, against sums over discrete steps and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.diffusion.schedules import SCHEDULES, add_noise, cosine_level, make_schedule
from gpdiff_jax.errors import InputError

_TIMES = np.linspace(0.0, 1.0, 1001)


@pytest.mark.parametrize("name", SCHEDULES)
def test_signal_falls_noise_grows_and_the_ends_are_exact(name):
    times = jnp.asarray(_TIMES, jnp.float32)
    for level in (make_schedule(name)(times), jax.jit(make_schedule(name))(times)):
        assert (np.diff(level.alpha) < 0).all() and (np.diff(level.sigma) > -1e-7).all()
        assert level.alpha[0] == 1 and level.sigma[0] == 0
        together = np.square(level.alpha) + np.square(level.sigma)
        if name == "rectified_flow":
            np.testing.assert_array_equal(level.alpha + level.sigma, np.ones(1001))
        else:
            np.testing.assert_allclose(together, 1.0, atol=1e-6)
        if name == "linear":
            assert level.alpha[-1] == pytest.approx(np.exp(-5.025), rel=1e-4)
        else:
            # Exactly no signal at the end: sampling begins from pure noise.
            assert level.alpha[-1] == 0 and level.sigma[-1] == 1


def test_cosine_is_a_cosine():
    times = jnp.asarray(_TIMES, jnp.float32)
    np.testing.assert_allclose(cosine_level(times).alpha, np.cos(np.pi * _TIMES / 2), atol=1e-6)


def _discrete_alphas(steps: int) -> np.ndarray:
    """Square root of alpha_bar of `steps` steps whose betas grow from 0.1 / steps to 20 / steps."""
    return np.sqrt(np.cumprod(1.0 - np.linspace(0.1, 20.0, steps) / steps))


def test_linear_is_the_limit_of_many_discrete_steps():
    continuous = np.asarray(make_schedule("linear")(jnp.asarray(_TIMES[1:], jnp.float32)).alpha)
    gaps = [np.abs(_discrete_alphas(1000 * k)[k - 1 :: k] - continuous).max() for k in (1, 8)]
    assert gaps[0] < 0.01 and gaps[1] < 0.2 * gaps[0]


def test_zero_terminal_snr_is_the_rescaled_linear_schedule():
    # The published rule: shift, so that the last step is zero, then scale, so that the first stays.
    linear = np.asarray(make_schedule("linear")(jnp.asarray(_TIMES, jnp.float32)).alpha, np.float64)
    rescaled = (linear - linear[-1]) * linear[0] / (linear[0] - linear[-1])
    level = make_schedule("zero_terminal_snr")(jnp.asarray(_TIMES, jnp.float32))
    np.testing.assert_allclose(level.alpha, rescaled, atol=1e-6)


def test_noise_is_added_by_the_level():
    x0, eps = jax.random.normal(jax.random.key(0), (2, 8))
    level = cosine_level(jnp.full(8, 1 / 3))
    np.testing.assert_allclose(add_noise(level, x0, eps), np.sqrt(0.75) * x0 + 0.5 * eps, rtol=1e-5)


def test_an_unknown_schedule_is_refused_with_the_names():
    with pytest.raises(InputError, match="`schedule` must be one of cosine, linear, zero_terminal_snr, rectified_flow"):
        make_schedule("quadratic")
