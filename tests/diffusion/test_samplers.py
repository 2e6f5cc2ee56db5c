"""In: a Gaussian mixture, whose mean of x0 given x_t is known in closed form. Out: samples of every sampler from it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.diffusion.objectives import Denoised, denoised, target
from gpdiff_jax.diffusion.samplers import SAMPLERS, check_sampler, ddim, guided, sample
from gpdiff_jax.diffusion.schedules import SCHEDULES, cosine_level
from gpdiff_jax.errors import InputError

_WEIGHTS = np.array([0.5, 0.3, 0.2])
_MEANS = np.array([[-2.0, 0.5], [1.5, 1.5], [1.0, -2.0]])
_FACTORS = np.array([[[0.5, 0.0], [0.2, 0.3]], [[0.3, 0.0], [-0.1, 0.5]], [[0.25, 0.0], [0.0, 0.25]]])
_COVARIANCES = _FACTORS @ np.swapaxes(_FACTORS, 1, 2)
_MEAN = _WEIGHTS @ _MEANS
_COVARIANCE = np.einsum("k,kij->ij", _WEIGHTS, _COVARIANCES) + np.cov(_MEANS.T, aweights=_WEIGHTS, bias=True)
_COUNT = 10_000


def _mean_of_x0(x_t: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    """E[x0 | x_t] of the mixture at one point [2]."""
    power, axes = (jnp.asarray(part, jnp.float32) for part in np.linalg.eigh(_COVARIANCES))
    total = jnp.square(alpha) * power + jnp.square(sigma)
    away = jnp.einsum("kij,ki->kj", axes, x_t[None] - alpha * jnp.asarray(_MEANS, jnp.float32))
    prior = jnp.log(jnp.asarray(_WEIGHTS, jnp.float32))
    logits = prior - 0.5 * (jnp.square(away) / total + jnp.log(total)).sum(axis=1)
    x0 = jnp.asarray(_MEANS, jnp.float32) + jnp.einsum("kij,kj->ki", axes, alpha * power * away / total)
    return jax.nn.softmax(logits) @ x0


def _perfect(schedule: str, objective: str):
    """What a network that has learned the mixture would say, led through its objective."""

    def denoise_fn(x_t: jax.Array, t: jax.Array) -> Denoised:
        level = SCHEDULES[schedule](t)
        x0 = jax.vmap(lambda x: _mean_of_x0(x, *level))(x_t)
        eps = (x_t - level.alpha * x0) / level.sigma
        return denoised(objective, level, x_t, target(objective, level, x0, eps))

    return denoise_fn


@functools.cache
def _compiled(sampler: str, schedule: str, objective: str, steps: int):
    def run(noise: jax.Array, key: jax.Array) -> jax.Array:
        def draw(step: jax.Array) -> jax.Array:
            return jax.random.normal(jax.random.fold_in(key, step), noise.shape)

        return sample(sampler, schedule, _perfect(schedule, objective), noise, steps, draw)

    return jax.jit(run)


def _draw(sampler: str, schedule: str, objective: str, steps: int, count: int = _COUNT) -> np.ndarray:
    noise_key, step_key = jax.random.split(jax.random.key(7))
    noise = jax.random.normal(noise_key, (count, 2))
    return np.asarray(_compiled(sampler, schedule, objective, steps)(noise, step_key), np.float64)


@pytest.mark.parametrize(
    ("sampler", "schedule", "objective", "steps"),
    [
        ("ddpm", "linear", "eps", 200),
        ("ddpm", "rectified_flow", "flow", 200),
        ("ddim", "cosine", "v", 100),
        ("ddim", "linear", "x0", 100),
        ("dpm_solver", "cosine", "v", 30),
        ("dpm_solver", "zero_terminal_snr", "x0", 30),
        ("dpm_solver", "linear", "eps", 30),
        ("euler", "rectified_flow", "flow", 100),
    ],
)
def test_samples_have_the_mean_the_covariance_and_the_weights_of_the_mixture(sampler, schedule, objective, steps):
    drawn = _draw(sampler, schedule, objective, steps)
    # Four standard errors of a mean and of a share, and what so many steps leave of bias.
    spread = 4 * np.sqrt(np.diag(_COVARIANCE) / _COUNT)
    assert (np.abs(drawn.mean(axis=0) - _MEAN) < spread + 0.01).all()
    np.testing.assert_allclose(np.cov(drawn.T), _COVARIANCE, atol=0.12)
    nearest = np.square(drawn[:, None] - _MEANS[None]).sum(axis=2).argmin(axis=1)
    shares = np.bincount(nearest, minlength=3) / _COUNT
    assert (np.abs(shares - _WEIGHTS) < 4 * np.sqrt(_WEIGHTS * (1 - _WEIGHTS) / _COUNT) + 0.005).all(), shares
    for mode in range(3):
        own = drawn[nearest == mode]
        np.testing.assert_allclose(own.mean(axis=0), _MEANS[mode], atol=0.05)
        np.testing.assert_allclose(np.cov(own.T), _COVARIANCES[mode], atol=0.04)


def _gap(one: np.ndarray, other: np.ndarray) -> float:
    """Root mean square distance but for the few points at a watershed, which end in another mode."""
    distance = np.sort(np.linalg.norm(one - other, axis=1))
    return float(np.sqrt(np.square(distance[: int(0.95 * len(distance))]).mean()))


@pytest.mark.parametrize("schedule", ["cosine", "rectified_flow"])
def test_deterministic_samplers_converge_to_each_other_and_the_second_order_one_is_ahead(schedule):
    objective = "v" if schedule == "cosine" else "flow"
    fine = _draw("dpm_solver", schedule, objective, 400, count=1000)
    names = ("ddim", "dpm_solver") if schedule == "cosine" else ("euler", "dpm_solver")
    gaps = {
        name: [_gap(_draw(name, schedule, objective, steps, count=1000), fine) for steps in (10, 40, 160)]
        for name in names
    }
    for name, (few, some, many) in gaps.items():
        assert few > 2 * some > 4 * many, (name, gaps)
        assert many < 0.03, (name, gaps)
    first, second = (gaps[name] for name in names)
    assert second[0] < 0.6 * first[0] and second[1] < 0.4 * first[1], gaps


def test_along_the_flow_euler_and_ddim_are_one():
    euler, by_ddim = (_draw(name, "rectified_flow", "flow", 10, count=1000) for name in ("euler", "ddim"))
    np.testing.assert_allclose(euler, by_ddim, atol=1e-4)


def test_ancestral_samples_depend_on_the_noise_of_the_steps_and_the_others_do_not():
    noise = jax.random.normal(jax.random.key(7), (1000, 2))
    for name, changes in (("ddpm", True), ("ddim", False)):
        run = _compiled(name, "rectified_flow", "flow", 10)
        one, other = (np.asarray(run(noise, jax.random.key(seed))) for seed in (0, 1))
        assert (one != other).any() == changes


def test_one_step_from_pure_noise_is_what_the_network_takes_for_clean():
    noise = jax.random.normal(jax.random.key(2), (5, 3))

    def denoise_fn(x_t: jax.Array, t: jax.Array) -> Denoised:
        assert t.shape == ()
        return denoised("v", cosine_level(t), x_t, jnp.sin(3.0 * x_t) + t)

    expected = -(np.sin(3.0 * np.asarray(noise)) + 1.0)
    for name in ("ddim", "ddpm", "dpm_solver"):
        drawn = sample(name, "cosine", denoise_fn, noise, 1, lambda step: jnp.ones((5, 3)))
        np.testing.assert_allclose(drawn, expected, atol=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_sampler_that_knows_the_answer_returns_it(sampler, steps):
    noise, x0 = jax.random.normal(jax.random.key(3), (2, 4))

    def denoise_fn(x_t: jax.Array, t: jax.Array) -> Denoised:
        level = SCHEDULES["rectified_flow"](t)
        return Denoised(x0, (x_t - level.alpha * x0) / level.sigma)

    drawn = sample(sampler, "rectified_flow", denoise_fn, noise, steps, lambda step: jnp.ones(4))
    np.testing.assert_allclose(drawn, x0, atol=1e-5)


def test_a_gaussians_flow_is_affine():
    """Without added noise the sample's own moments are carried over."""
    noise = jax.random.normal(jax.random.key(0), (200, 2))
    spread = jnp.asarray([0.5, 2.0])

    def denoise_fn(x_t: jax.Array, t: jax.Array) -> Denoised:
        level = cosine_level(t)
        gain = level.alpha * jnp.square(spread) / (jnp.square(level.alpha * spread) + jnp.square(level.sigma))
        x0 = 1.0 + gain[None] * (x_t - level.alpha)
        return Denoised(x0, (x_t - level.alpha * x0) / level.sigma)

    drawn = np.asarray(jax.jit(lambda x: ddim(denoise_fn, cosine_level, x, 200))(noise))
    np.testing.assert_allclose(drawn, 1.0 + np.asarray(spread)[None] * np.asarray(noise), atol=0.1)
    design = np.concatenate([np.asarray(noise), np.ones((200, 1))], axis=1)
    np.testing.assert_allclose(drawn, design @ np.linalg.lstsq(design, drawn, rcond=None)[0], atol=1e-3)


@pytest.mark.parametrize(
    ("sampler", "schedule", "words"),
    [
        ("heun", "cosine", "`sampler` must be one of ddim, ddpm, dpm_solver, euler, got 'heun'"),
        ("euler", "cosine", "`sampler` 'euler' needs schedule 'rectified_flow', got 'cosine'; use 'ddim'"),
    ],
)
def test_a_sampler_that_does_not_go_with_the_schedule_is_refused(sampler, schedule, words):
    with pytest.raises(InputError, match=words):
        check_sampler(sampler, schedule)


def test_guidance_goes_from_unconditional_over_told_beyond():
    conditional, unconditional = jnp.asarray([1.0, 5.0]), jnp.asarray([3.0, 1.0])
    np.testing.assert_array_equal(guided(conditional, unconditional, 0.0), unconditional)
    np.testing.assert_array_equal(guided(conditional, unconditional, 1.0), conditional)
    np.testing.assert_array_equal(guided(conditional, unconditional, 2.0), [-1.0, 9.0])
