"""In: the pure functions that everything is made of. Out: the same numbers with jit, without, and under pmap."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from gpdiff_jax.diffusion.objectives import denoised, target
from gpdiff_jax.diffusion.samplers import SAMPLERS, guided, sample
from gpdiff_jax.diffusion.schedules import SCHEDULES, add_noise
from gpdiff_jax.models.loss import DELTA, masked_absolute, masked_huber
from gpdiff_jax.prompts.urban_graph.ranking import filtered_ranks
from gpdiff_jax.vectors import squared_distances
from gpdiff_jax.zoo.codec import fit_codec
from gpdiff_jax.zoo.tokens import make_layout, to_tokens

_RNG = np.random.default_rng(0)
_FORECAST, _TRUTH = (_RNG.normal(size=(5, 6)).astype(np.float32) for _ in range(2))
_MASK = (_RNG.random((5, 6)) < 0.7).astype(np.float32)
_PAIR, _WEIGHT = jax.device_put(((_FORECAST, _TRUTH), _MASK))


class VariantsTest(chex.TestCase):
    """Each against NumPy, or against a fact of the mathematics."""

    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_losses(self):
        error = np.abs(_FORECAST - _TRUTH)
        huber = np.where(error < DELTA, error**2 / (2 * DELTA), error - DELTA / 2)
        got = self.variant(masked_huber)(*_PAIR, _WEIGHT)
        np.testing.assert_allclose(got, (huber * _MASK).sum() / _MASK.sum(), rtol=1e-5)
        got = self.variant(masked_absolute)(*_PAIR, _WEIGHT)
        np.testing.assert_allclose(got, (error * _MASK).sum() / _MASK.sum(), rtol=1e-5)
        self.assertTrue(np.isnan(self.variant(masked_absolute)(*_PAIR, 0.0 * _WEIGHT)))

    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_distances(self):
        wanted = np.square(_FORECAST[:, None] - _TRUTH[None]).sum(axis=2)
        np.testing.assert_allclose(self.variant(squared_distances)(*_PAIR), wanted, rtol=1e-4)
        np.testing.assert_allclose(squared_distances(_FORECAST, _TRUTH), wanted, rtol=1e-4)

    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_ranks(self):
        truth, others = np.asarray([0, 3, 5, 1, 2], np.int32), _MASK < 0.5
        wanted = [
            1 + sum(row[k] > row[t] for k in range(6) if k != t and not hidden[k])
            for row, t, hidden in zip(_FORECAST, truth, others, strict=True)
        ]
        np.testing.assert_array_equal(self.variant(filtered_ranks)(*jax.device_put((_FORECAST, truth, others))), wanted)

    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_noise_and_what_takes_it_away(self):
        for name in ("linear", "cosine", "rectified_flow"):
            objective = "flow" if name == "rectified_flow" else "v"

            def there_and_back(x0, eps, objective=objective, schedule=SCHEDULES[name]):
                level = schedule(jnp.full(x0.shape, 0.4))
                return denoised(objective, level, add_noise(level, x0, eps), target(objective, level, x0, eps))

            chex.assert_trees_all_close(
                tuple(self.variant(there_and_back)(*_PAIR)), (_FORECAST, _TRUTH), rtol=1e-4, atol=1e-5
            )

    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_guidance(self):
        for guidance, wanted in [(0.0, _TRUTH), (1.0, _FORECAST), (2.0, 2 * _FORECAST - _TRUTH)]:
            got = self.variant(lambda one, other, guidance=guidance: guided(one, other, guidance))(*_PAIR)
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)

    @parameterized.parameters(*(name for name in SAMPLERS if name != "ddpm"))
    def test_a_sampler_whose_denoiser_knows_the_answer_ends_there(self, name):
        schedule = "rectified_flow" if name == "euler" else "cosine"

        def draw(noise):
            def knows(x_t, t):
                level = SCHEDULES[schedule](t)
                eps = (x_t - level.alpha * _TRUTH) / jnp.maximum(level.sigma, 1e-3)
                return denoised("eps", level, x_t, eps)._replace(x0=jnp.asarray(_TRUTH))

            return sample(name, schedule, knows, noise, 8, jnp.zeros_like)

        made = [
            call(draw)(jnp.asarray(_FORECAST))
            for call in (jax.jit, lambda f: f, lambda f: lambda x: jax.pmap(f)(x[None])[0])
        ]
        chex.assert_trees_all_close(*made, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(made[0], _TRUTH, atol=1e-2)

    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_latents_and_back(self):
        pooled = {"bias": np.zeros(3, np.float32), "kernel": np.ones((3, 4), np.float32)}
        layout = make_layout(pooled, 4)
        tokens = np.asarray(to_tokens(layout, pooled)) + 0.1 * _RNG.normal(size=(6, layout.num_tokens, 4)).astype(
            np.float32
        )
        tokens *= layout.mask()
        codec = fit_codec(layout, np.asarray(to_tokens(layout, pooled)), tokens, np.ones(6), 0)
        back = self.variant(lambda rows: codec.decode(codec.encode(rows)))(jnp.asarray(tokens[2]))
        np.testing.assert_allclose(back * layout.mask(), tokens[2], rtol=1e-5, atol=1e-6)
