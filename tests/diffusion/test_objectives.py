"""In: random signals and noise at every level. Out: the way from every objective back, and weights that agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.diffusion.objectives import OBJECTIVES, check_objective, denoised, min_snr_weight, target
from gpdiff_jax.diffusion.schedules import SCHEDULES, NoiseLevel, add_noise, cosine_level, make_schedule
from gpdiff_jax.errors import InputError


def _defined(objective: str, schedule: str) -> bool:
    try:
        check_objective(objective, schedule)
    except InputError:
        return False
    return True


_PAIRS = [(objective, schedule) for objective in OBJECTIVES for schedule in SCHEDULES if _defined(objective, schedule)]


def _mixed(schedule: str, time: float) -> tuple[NoiseLevel, jax.Array, jax.Array]:
    x0, eps = jax.random.normal(jax.random.key(0), (2, 50))
    return make_schedule(schedule)(jnp.full(50, time, jnp.float32)), x0, eps


def test_what_is_undefined_is_refused_and_nothing_else():
    refused = {(o, s) for o in OBJECTIVES for s in SCHEDULES} - set(_PAIRS)
    assert refused == {
        ("eps", "cosine"),
        ("eps", "zero_terminal_snr"),
        ("eps", "rectified_flow"),
        ("v", "rectified_flow"),
    }
    for schedule in SCHEDULES:
        # eps is refused exactly where it would be divided by zero.
        ends_without_signal = float(make_schedule(schedule)(jnp.ones(())).alpha) == 0
        assert (("eps", schedule) in refused) == ends_without_signal


@pytest.mark.parametrize(
    ("objective", "schedule", "words"),
    [
        ("eps", "cosine", "`objective` 'eps' is undefined where schedule 'cosine' ends without signal"),
        ("v", "rectified_flow", "`objective` 'v' needs a schedule that preserves variance"),
        ("score", "cosine", "`objective` must be one of v, eps, x0, flow, got 'score'"),
        ("v", "quadratic", "`schedule` must be one of cosine, linear, zero_terminal_snr, rectified_flow"),
    ],
)
def test_a_refusal_says_what_to_use(objective, schedule, words):
    with pytest.raises(InputError, match=words):
        check_objective(objective, schedule)


@pytest.mark.parametrize(("objective", "schedule"), _PAIRS)
@pytest.mark.parametrize("time", [0.0, 1e-3, 0.6, 1.0])
def test_an_exact_prediction_leads_back_to_signal_and_noise(objective, schedule, time):
    level, x0, eps = _mixed(schedule, time)
    x_t = add_noise(level, x0, eps)
    found = denoised(objective, level, x_t, target(objective, level, x0, eps))
    # Rounding is divided by what is left of the signal, or of the noise.
    signal = float(level.alpha[0]) if objective == "eps" else 1.0
    np.testing.assert_allclose(found.x0, x0, atol=2e-6 / signal)
    if objective != "x0" or time > 0:
        noise = float(level.sigma[0]) if objective == "x0" else 1.0
        np.testing.assert_allclose(found.eps, eps, atol=2e-6 / noise)


@pytest.mark.parametrize(("objective", "schedule"), _PAIRS)
def test_any_prediction_is_parted_so_that_its_parts_make_the_noisy_value(objective, schedule):
    level, x_t, prediction = _mixed(schedule, 0.6)
    parts = denoised(objective, level, x_t, prediction)
    np.testing.assert_allclose(add_noise(level, *parts), x_t, atol=3e-6)
    np.testing.assert_allclose(target(objective, level, *parts), prediction, atol=3e-5)


def test_at_the_ends_velocity_is_the_noise_and_minus_the_signal():
    x0, eps = jax.random.normal(jax.random.key(1), (2, 8))
    np.testing.assert_array_equal(target("v", cosine_level(jnp.zeros(8)), x0, eps), eps)
    np.testing.assert_array_equal(target("v", cosine_level(jnp.ones(8)), x0, eps), -x0)


def test_velocity_is_the_slope_of_the_path():
    x0, eps = jax.random.normal(jax.random.key(2), (2, 8))
    for objective, schedule, speed in (("v", "cosine", np.pi / 2), ("flow", "rectified_flow", 1.0)):
        level = make_schedule(schedule)

        def path(t: jax.Array, level=level) -> jax.Array:
            return add_noise(NoiseLevel(*(jnp.broadcast_to(part, (8,)) for part in level(t))), x0, eps)

        t = jnp.asarray(0.3)
        slope = jax.jvp(path, (t,), (jnp.ones(()),))[1]
        np.testing.assert_allclose(slope, speed * target(objective, level(t), x0, eps), atol=1e-5)


@pytest.mark.parametrize(("objective", "schedule"), _PAIRS)
def test_weighted_errors_are_the_same_through_every_objective(objective, schedule):
    """min(snr, gamma) times the squared error of x0, whatever the network predicts."""
    for time in (0.03, 0.3, 0.6, 0.9):
        level, x0, eps = _mixed(schedule, time)
        x_t = add_noise(level, x0, eps)
        wrong = target(objective, level, x0, eps) + 0.3
        error = np.square(np.asarray(denoised(objective, level, x_t, wrong).x0 - x0, np.float64))
        snr = np.square(np.asarray(level.alpha, np.float64) / np.asarray(level.sigma, np.float64))
        weighted = np.asarray(min_snr_weight(objective, level, 5.0)) * 0.3**2
        np.testing.assert_allclose(weighted, np.minimum(snr, 5.0) * error, rtol=2e-3)


def test_weights_are_those_of_the_paper_and_finite_at_the_ends():
    level = cosine_level(jnp.asarray([0.1, 0.5, 0.9]))
    snr = np.square(np.asarray(level.alpha) / np.asarray(level.sigma))
    np.testing.assert_allclose(min_snr_weight("x0", level, 5.0), np.minimum(snr, 5), rtol=1e-5)
    np.testing.assert_allclose(min_snr_weight("eps", level, 5.0), np.minimum(snr, 5) / snr, rtol=1e-5)
    np.testing.assert_allclose(min_snr_weight("v", level, 5.0), np.minimum(snr, 5) / (snr + 1), rtol=1e-5)
    ends = cosine_level(jnp.asarray([0.0, 1.0]))
    np.testing.assert_array_equal(min_snr_weight("x0", ends, 5.0), [5, 0])
    np.testing.assert_array_equal(min_snr_weight("v", ends, 5.0), [0, 0])
    np.testing.assert_array_equal(min_snr_weight("flow", ends, 5.0), [0, 0])
