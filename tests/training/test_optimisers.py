"""In: gradients, short and long. Out: how far an optimiser goes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpdiff_jax.training.optimisers import at_rate, clipped_adam, clipped_descent, rated_adam


@pytest.mark.parametrize(("gradient", "moved"), [([0.3, -0.4], [-0.03, 0.04]), ([30.0, -40.0], [-0.06, 0.08])])
def test_a_step_is_as_long_as_its_gradient_and_no_longer_than_its_rate(gradient, moved):
    optimiser = clipped_descent()
    updates, _ = optimiser.update(jnp.asarray(gradient), at_rate(optimiser.init(jnp.zeros(2)), 0.1))
    np.testing.assert_allclose(updates, moved, rtol=1e-6)


def test_the_rate_is_of_the_state_so_that_one_program_takes_any():
    optimiser, calls = clipped_descent(), []
    state = optimiser.init(jnp.zeros(1))

    @jax.jit
    def step(gradient: jax.Array, state: optax.OptState) -> jax.Array:
        calls.append(None)
        return optimiser.update(gradient, state)[0]

    for rate in (0.1, 0.2):
        np.testing.assert_allclose(step(jnp.ones(1), at_rate(state, rate)), [-rate], rtol=1e-6)
    assert len(calls) == 1


def test_adam_with_its_rate_in_its_state_is_adam():
    fixed, rated = clipped_adam(0.1), rated_adam()
    params, gradients = jnp.zeros(2), jnp.asarray([[0.3, -0.4], [30.0, 1.0], [0.0, 2.0]])
    states = fixed.init(params), at_rate(rated.init(params), 0.1)
    for gradient in gradients:
        (want, one), (got, two) = fixed.update(gradient, states[0]), rated.update(gradient, states[1])
        np.testing.assert_allclose(got, want, rtol=1e-6)
        states = one, two
