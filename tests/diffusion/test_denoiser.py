"""In: noisy latents of a few regions, times and prompts. Out: what a denoiser's velocity may depend on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.diffusion.denoiser import Denoiser, DenoiserConfig, denoise
from gpdiff_jax.errors import InputError

_ROWS, _WIDTH, _PROMPT, _BATCH = 5, 6, 4, 3


_EXAMPLE = jnp.zeros((_ROWS, _WIDTH)), jnp.zeros(()), jnp.zeros(_PROMPT), jnp.ones(())


@pytest.fixture(scope="module", name="network")
def _network():
    """A denoiser, variables without the zeros that training begins with, and its compiled batch."""
    denoiser = Denoiser(DenoiserConfig(width=16, layers=2, heads=2, prompt_bottleneck=5), (0, 0, 1, 1, 2), _WIDTH)
    shapes = jax.eval_shape(denoiser.init, jax.random.key(0), *_EXAMPLE)["params"]
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), shapes)
    return denoiser, variables, jax.jit(functools.partial(denoise, denoiser))


@pytest.fixture(scope="module", name="inputs")
def _inputs():
    keys = jax.random.split(jax.random.key(2), 3)
    x_t = jax.random.normal(keys[0], (_BATCH, _ROWS, _WIDTH))
    return x_t, jax.random.uniform(keys[1], (_BATCH,)), jax.random.normal(keys[2], (_BATCH, _PROMPT))


def test_a_dropped_prompt_is_not_heard_and_a_given_one_is(network, inputs):
    _, moved, run = network
    x_t, t, prompt = inputs
    other = prompt + 1.0
    dropped = [np.asarray(run(moved, x_t, t, shown, jnp.zeros(_BATCH))) for shown in (prompt, other)]
    np.testing.assert_array_equal(*dropped)
    predictions = [np.asarray(run(moved, x_t, t, shown, jnp.ones(_BATCH))) for shown in (prompt, other)]
    assert np.abs(predictions[0] - predictions[1]).max() > 1e-3
    assert np.abs(predictions[0] - dropped[0]).max() > 1e-3


def test_time_and_every_row_are_heard_by_every_row(network, inputs):
    _, moved, run = network
    x_t, t, prompt = inputs
    expected = np.asarray(run(moved, x_t, t, prompt, jnp.ones(_BATCH)))
    assert np.abs(np.asarray(run(moved, x_t, t + 0.1, prompt, jnp.ones(_BATCH))) - expected).max() > 1e-3
    for row in range(_ROWS):
        changed = np.asarray(run(moved, x_t.at[:, row].add(1.0), t, prompt, jnp.ones(_BATCH)))
        assert (np.abs(changed - expected).max(axis=(0, 2)) > 1e-6).all(), row


def test_rows_of_a_batch_do_not_hear_each_other(network, inputs):
    denoiser, moved, run = network
    x_t, t, prompt = inputs
    prompt_mask = jnp.asarray([1.0, 0.0, 1.0])
    together = np.asarray(run(moved, x_t, t, prompt, prompt_mask))
    alone = [denoiser.apply({"params": moved}, x_t[k], t[k], prompt[k], prompt_mask[k]) for k in range(_BATCH)]
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-4, atol=1e-5)
    changed = np.asarray(run(moved, x_t.at[1].add(5.0), t.at[1].set(0.9), prompt.at[1].add(3.0), prompt_mask))
    np.testing.assert_array_equal(changed[[0, 2]], together[[0, 2]])
    assert (changed[1] != together[1]).any()


def test_rows_are_told_apart_by_place_and_layer(network):
    _, moved, run = network
    same = jnp.broadcast_to(jnp.ones((1, 1, _WIDTH)), (_BATCH, _ROWS, _WIDTH))
    v = np.asarray(run(moved, same, jnp.full(_BATCH, 0.5), jnp.zeros((_BATCH, _PROMPT)), jnp.ones(_BATCH)))
    assert np.abs(v[0][:, None] - v[0][None])[~np.eye(_ROWS, dtype=bool)].max(axis=1).min() > 1e-3


def test_every_leaf_gets_a_gradient_off_the_start(network, inputs):
    denoiser, moved, _ = network
    x_t, t, prompt = inputs
    prompt_mask = jnp.asarray([1.0, 0.0, 1.0])
    grads = jax.jit(jax.grad(lambda v: jnp.square(denoise(denoiser, v, x_t, t, prompt, prompt_mask) - 1.0).mean()))(
        moved
    )
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(grad).all(), name
        # A shift of all keys alike cancels in the softmax, and the last norm gates no branch.
        if "'key']['bias" not in name:
            assert np.abs(grad).max() > 1e-8, name


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"width": 30}, r"`width` \(=30\) must be a multiple of 2 x `heads` \(=4\)"),
        ({"objective": "eps"}, "`objective` 'eps' is undefined where schedule 'cosine' ends without signal"),
        ({"layers": 0}, "`layers` must be at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(values, words):
    with pytest.raises(InputError, match=words):
        DenoiserConfig(**values)
