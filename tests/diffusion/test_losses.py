"""In: a denoiser that says zero and a functional loss made up. Out: how the loss weighs noise levels, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.diffusion import losses
from gpdiff_jax.diffusion.denoiser import Denoiser, DenoiserConfig
from gpdiff_jax.diffusion.losses import DiffusionBatch, make_diffusion_loss
from gpdiff_jax.diffusion.schedules import SCHEDULES

_SIZE, _SHAPE = 64, (2, 3)


@pytest.fixture(autouse=True)
def _a_network_that_says_zero(monkeypatch):
    monkeypatch.setattr(losses, "denoise", lambda denoiser, variables, x_t, *others: jnp.zeros_like(x_t))


def _losses(schedule: str, objective: str, functional, **options):
    """Token and functional loss, with the times, latents and noise that they were made from."""
    config = DenoiserConfig(width=4, layers=1, heads=1, prompt_bottleneck=1, schedule=schedule, objective=objective)
    denoiser = Denoiser(config, (0, 1), 3)
    shares = {"functional_weight": 1.0, "token_weight": 1.0, "prompt_dropout": 0.0, "prompt_noise": 0.0}
    loss_fn = make_diffusion_loss(denoiser, functional, jnp.ones(_SHAPE), pure_noise_share=0.0, **(shares | options))
    key, rows, numbers = jax.random.key(5), jnp.zeros(_SIZE, jnp.int32), jnp.arange(_SIZE, dtype=jnp.int32)
    x0 = jax.random.normal(jax.random.key(6), (_SIZE, *_SHAPE))
    _, parts = jax.jit(loss_fn)({}, DiffusionBatch(x0, jnp.zeros((_SIZE, 2)), rows, rows, numbers), key)
    own = jax.vmap(lambda number: jax.random.split(jax.random.fold_in(jax.random.split(key)[0], number), 3))(numbers)
    t = jax.vmap(lambda keys: jax.random.uniform(keys[0], (3,)))(own)[:, 0]
    eps = jax.vmap(lambda keys: jax.random.normal(keys[1], _SHAPE))(own)
    alpha, sigma = (np.asarray(part, np.float64)[:, None, None] for part in SCHEDULES[schedule](t))
    return parts, alpha, sigma, np.asarray(x0, np.float64), np.asarray(eps, np.float64)


def _ones(x0: jax.Array, batch: DiffusionBatch, *, key: jax.Array) -> jax.Array:
    del batch, key
    return jnp.ones(x0.shape[0])


@pytest.mark.parametrize(("schedule", "objective"), [("cosine", "v"), ("linear", "eps"), ("rectified_flow", "flow")])
def test_token_losses_are_weighed_by_min_snr_and_functional_losses_by_signal(schedule, objective):
    options = {"min_snr_gamma": 5.0, "functional_by_signal": True}
    parts, alpha, sigma, x0, eps = _losses(schedule, objective, _ones, **options)
    wanted = {"v": alpha * eps - sigma * x0, "eps": eps, "flow": eps - x0}[objective]
    # The error of x0 of somebody who predicts zero, whatever it is that is predicted.
    error = {"v": sigma * wanted, "eps": sigma / alpha * wanted, "flow": sigma / (alpha + sigma) * wanted}[objective]
    weight = np.minimum((alpha / sigma) ** 2, 5.0)
    assert parts.token_loss == pytest.approx((weight * error**2).mean(), rel=1e-3)
    assert parts.functional_loss == pytest.approx((alpha**2 / (alpha**2 + sigma**2)).mean(), rel=1e-4)


def test_without_weights_all_noise_levels_count_alike():
    parts, _, _, x0, _ = _losses("zero_terminal_snr", "x0", _ones)
    assert parts.token_loss == pytest.approx((x0**2).mean(), rel=1e-4)
    assert parts.functional_loss == 1.0


def test_codes_made_from_eps_at_hardly_any_signal_are_cut_to_a_size_that_codes_have():
    def largest(x0: jax.Array, batch: DiffusionBatch, *, key: jax.Array) -> jax.Array:
        del batch, key
        return jnp.full(x0.shape[0], jnp.abs(x0).max())

    parts, alpha, sigma, x0, eps = _losses("linear", "eps", largest)
    # Who takes the noise for zero takes x_t / alpha for clean.
    assert np.abs((alpha * x0 + sigma * eps) / alpha).max() > 50
    assert parts.functional_loss == 4.0
