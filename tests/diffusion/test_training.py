"""In: a toy zoo whose latents follow from the prompt. Out: a generator that learns it, and says when it cannot."""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.cities import City
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.data.sources import Sources, prepare_sources
from gpdiff_jax.diffusion import denoiser_training, losses
from gpdiff_jax.diffusion.denoiser import Denoiser, DenoiserConfig, denoise, make_denoiser
from gpdiff_jax.diffusion.denoiser_training import make_denoiser_step, train_denoiser
from gpdiff_jax.diffusion.training import (
    PretrainConfig,
    TrainingData,
    ZooLatents,
    draw_batch,
    held_out_regions,
    network_optimiser,
)
from gpdiff_jax.errors import InputError
from gpdiff_jax.models import ModelSizes
from gpdiff_jax.prompts.sources import with_prompts
from gpdiff_jax.training.parallel import DEVICES, replicate
from gpdiff_jax.training.step import start_training
from gpdiff_jax.zoo.codec import Codec, fit_codec
from gpdiff_jax.zoo.tokens import make_layout, to_tokens
from tests.tiny import scale_and_bias

_CONFIG = PretrainConfig(
    denoiser=DenoiserConfig(width=16, layers=1, heads=2, prompt_bottleneck=8),
    steps=300,
    batch=16,
    windows=2,
    learning_rate=5e-3,
    evaluations=30,
    held_out_share=0.2,
)


_LINEAR = scale_and_bias(ModelSizes(history=12, horizon=6, num_inputs=1, num_covariates=0))


@pytest.fixture(scope="module", name="sources")
def _sources(simulated_cities: list[City]) -> Sources:
    data = DataConfig(covariates="none", variants=3, max_neighbours=2)
    cities = simulated_cities[:2]
    return with_prompts(prepare_sources(cities, data, key=jax.random.key(0), validation_windows=4), cities)


@pytest.fixture(scope="module", name="toy")
def _toy(sources: Sources) -> tuple[ZooLatents, Codec, np.ndarray]:
    """Latents that are a linear function of two prompt entries, and a codec for them."""
    rng = np.random.default_rng(0)
    prompt = rng.normal(size=(3, sources.num_regions, 4)).astype(np.float32)
    prompt[1:] = prompt[0] + 0.05 * rng.normal(size=(2, sources.num_regions, 4)).astype(np.float32)
    vectors = [
        {"bias": 0.3 * p[0] * np.ones(6, np.float32), "scale": 0.5 + 0.3 * p[1] * np.ones(6, np.float32)}
        for p in prompt[0]
    ]
    pooled = {"bias": np.zeros(6, np.float32), "scale": np.full(6, 0.5, np.float32)}
    layout = make_layout(pooled, 8)
    tokens = np.stack([to_tokens(layout, jax.tree.map(lambda leaf: leaf.astype(np.float32), v)) for v in vectors])
    codec = fit_codec(layout, np.asarray(to_tokens(layout, pooled)), tokens, np.ones(len(tokens)), 0)
    latents = jnp.stack([codec.encode(jnp.asarray(t)) for t in tokens])[:, None]
    held_out = held_out_regions(sources, 0.2, key=jax.random.key(1))
    probabilities = jnp.asarray(np.where(held_out, 0.0, 1.0), jnp.float32)
    return ZooLatents(latents, jnp.asarray(prompt), probabilities), codec, held_out


def _train(sources: Sources, toy, config: PretrainConfig = _CONFIG, zoo: ZooLatents | None = None, devices=None):
    latents, codec, held_out = toy
    log: list[dict[str, float]] = []
    variables = train_denoiser(
        _LINEAR,
        sources,
        zoo or latents,
        codec,
        held_out,
        config,
        key=jax.random.key(2),
        devices=devices,
        progress=lambda done, metrics: log.append({"done": done, **metrics}),
    )
    return variables, log


@pytest.fixture(scope="module", name="trained")
def _trained(sources, toy):
    return _train(sources, toy)


def test_the_losses_of_a_toy_zoo_fall(trained):
    _, log = trained
    assert [line["done"] for line in log] == list(range(10, 301, 10))
    assert log[-1]["token_loss"] < 0.7 * log[0]["token_loss"]
    assert log[-1]["validation_loss"] < log[0]["validation_loss"]
    for line in log:
        parts = line["token_loss"] + _CONFIG.functional_weight * line["functional_loss"]
        assert line["loss"] == pytest.approx(parts, rel=1e-4)
        assert line["grad_norm"] > 0 and line["update_norm"] > 0 and line["param_norm"] > 0


def test_training_is_the_same_every_time(sources, toy, trained):
    again = _train(sources, toy)
    assert again[1] == trained[1]
    chex.assert_trees_all_equal(again[0], trained[0])


def test_many_regions_are_judged_in_parts_that_give_the_same_numbers(sources, toy, monkeypatch):
    config = dataclasses.replace(_CONFIG, steps=2, evaluations=2)
    whole = _train(sources, toy, config)[1]
    assert toy[2].sum() > 2
    for module in (losses, denoiser_training):
        monkeypatch.setattr(module, "SIDE_BY_SIDE", 2)
    worked, map_rows = [], jax.lax.map

    def spy(function, rows, *, batch_size=None):
        worked.append((len(jax.tree.leaves(rows)[0]), batch_size))
        return map_rows(function, rows, batch_size=batch_size)

    monkeypatch.setattr(jax.lax, "map", spy)
    parts = _train(sources, toy, config)[1]
    assert worked.count((toy[2].sum(), 2)) == 2  # the network and its forecasts
    for one, other in zip(whole, parts, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_a_step_that_is_not_finite_is_named_exactly_and_the_steps_before_it_are_reported(sources, toy):
    latents, codec, held_out = toy
    region = int(np.flatnonzero(~held_out)[0])
    rare = latents.probabilities.at[region].set(0.02)
    broken = dataclasses.replace(latents, probabilities=rare, x0=latents.x0.at[region].set(jnp.nan))
    # The draws of every step are known before, so it is known when the broken region comes first.
    draw = jax.jit(functools.partial(draw_batch, broken, _CONFIG.batch))
    key = jax.random.split(jax.random.split(jax.random.key(2))[1])[0]
    drawn = [
        region in np.asarray(draw(key=jax.random.split(jax.random.fold_in(key, step))[0]).region)
        for step in range(_CONFIG.steps)
    ]
    first, log = drawn.index(True) + 1, []
    assert 1 < first < _CONFIG.steps and first % 10 != 1
    with pytest.raises(FloatingPointError, match=rf"is not finite at step {first}; lower"):
        train_denoiser(
            *(_LINEAR, sources, broken, codec, held_out, _CONFIG),
            key=jax.random.key(2),
            progress=lambda done, metrics: log.append((done, metrics)),
        )
    assert log[-1][0] == first - 1 and all(np.isfinite(list(metrics.values())).all() for _, metrics in log)


def test_one_step_gives_the_numbers_that_it_gave(sources, toy):
    latents, codec, _ = toy
    step = make_denoiser_step(_LINEAR, codec, (), _CONFIG, 1)
    start = start_training(_initial(latents, codec), network_optimiser(_CONFIG), averaged=True)
    state, metrics = _map_once(step, start, TrainingData(sources, latents, codec))
    # An untrained denoiser says v = 0, so the token loss is the mean square of v, about one.
    assert metrics["token_loss"] == pytest.approx(0.679, rel=0.02)
    assert metrics["functional_loss"] == pytest.approx(0.580, rel=0.02)
    assert metrics["grad_norm"] == pytest.approx(0.846, rel=0.05)
    assert int(state.step) == 1


def _initial(latents: ZooLatents, codec: Codec, config: DenoiserConfig = _CONFIG.denoiser) -> dict:
    example = (jnp.zeros(shape) for shape in (latents.x0.shape[2:], (), latents.prompts.shape[2:], ()))
    init_key = jax.random.split(jax.random.key(2))[0]
    return jax.jit(make_denoiser(config, codec, ()).init)(init_key, *example)["params"]


def _map_once(step, state, data):
    """One step as the loop takes it, on one device."""
    train_key = jax.random.split(jax.random.split(jax.random.key(2))[1])[0]
    shared = replicate((state, data, train_key), jax.local_devices()[:1])
    made = jax.pmap(step, axis_name=DEVICES, devices=jax.local_devices()[:1])(*shared)
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf)[0]), made)


def test_bfloat16_is_what_the_layers_compute_in_while_everything_that_lasts_is_float32(sources, toy, trained):
    latents, codec, _ = toy
    half = dataclasses.replace(_CONFIG, denoiser=dataclasses.replace(_CONFIG.denoiser, dtype="bfloat16"))
    wide, narrow = (make_denoiser(config.denoiser, codec, ()) for config in (_CONFIG, half))
    example = latents.x0[:, 0], jnp.ones(latents.x0.shape[0]), latents.prompts[0], jnp.ones(latents.x0.shape[0])
    # Flax's attention multiplies float32 weights of its softmax with bfloat16 values.
    with jax.numpy_dtype_promotion("standard"):
        program = jax.jit(functools.partial(denoise, narrow)).lower(trained[0], *example)
        made, exact = (jax.jit(functools.partial(denoise, one))(trained[0], *example) for one in (narrow, wide))
        step = make_denoiser_step(_LINEAR, codec, (), half, 1)
        state = start_training(_initial(latents, codec, half.denoiser), network_optimiser(half), averaged=True)
        args = jax.tree.map(lambda leaf: leaf[None], (state, TrainingData(sources, latents, codec), jax.random.key(0)))
        after = jax.eval_shape(lambda *args: jax.pmap(step, axis_name=DEVICES)(*args)[0].params, *args)
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype("float32")} == {made.dtype}
    assert (made != exact).any()
    np.testing.assert_allclose(made, exact, atol=0.03 * float(jnp.abs(exact).max()))
    products = [line for line in program.as_text().splitlines() if "stablehlo.dot_general" in line]
    # The latents come in and go out in float32; what lies between them does not.
    assert sum("bf16" in line for line in products) > len(products) / 2


def test_held_out_regions_are_a_share_of_every_city_and_never_drawn(sources, toy):
    held_out = held_out_regions(sources, 0.25, key=jax.random.key(5))
    city = np.asarray(sources.city_index)
    assert [held_out[city == k].sum() for k in range(2)] == [2, 2]
    assert not held_out_regions(sources, 0.0, key=jax.random.key(5)).any()
    draws = [held_out_regions(sources, 0.25, key=jax.random.key(seed)) for seed in range(4)]
    assert any((one != other).any() for one, other in itertools.pairwise(draws))
    latents, _, kept_out = toy
    batch = jax.jit(functools.partial(draw_batch, latents, 500))(key=jax.random.key(0))
    assert not np.asarray(kept_out)[np.asarray(batch.region)].any()
    assert set(np.asarray(batch.region).tolist()) == set(np.flatnonzero(~kept_out).tolist())
    assert set(np.asarray(batch.variant).tolist()) == {0, 1, 2}
    np.testing.assert_array_equal(batch.prompt, np.asarray(latents.prompts)[batch.variant, batch.region])
    np.testing.assert_array_equal(batch.x0, np.asarray(latents.x0)[batch.region, 0])


def test_odds_say_how_often_a_region_is_drawn(toy):
    latents, _, _ = toy
    probabilities = jnp.zeros(latents.probabilities.shape).at[jnp.asarray([3, 5])].set(jnp.asarray([1.0, 3.0]))
    batch = jax.jit(lambda key: draw_batch(dataclasses.replace(latents, probabilities=probabilities), 2000, key=key))(
        jax.random.key(0)
    )
    share = (np.asarray(batch.region) == 5).mean()
    assert set(np.asarray(batch.region).tolist()) == {3, 5} and abs(share - 0.75) < 0.04


def test_what_is_learned_follows_the_prompt(toy, trained):
    latents, codec, _ = toy
    variables, _ = trained
    denoiser = Denoiser(_CONFIG.denoiser, codec.layer_of_row, codec.mask().shape[1])
    count = latents.prompts.shape[1]
    noise = jax.random.normal(jax.random.key(9), latents.x0[:, 0].shape) * jnp.asarray(codec.mask())[None]
    run = jax.jit(functools.partial(denoise, denoiser))
    drawn = -np.asarray(run(variables, noise, jnp.ones(count), latents.prompts[0], jnp.ones(count)))
    for entry in range(2):
        learned, true = drawn[:, entry, 0], np.asarray(latents.x0)[:, 0, entry, 0]
        assert np.corrcoef(learned, true)[0, 1] > 0.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "`steps` must be above 0, got 0"),
        ({"ema": 1.0}, r"`ema` must be in \[0, 1\), got 1.0"),
        ({"prompt_dropout": -0.1}, r"`prompt_dropout` must be in \[0, 1\), got -0.1"),
    ],
)
def test_a_configuration_out_of_range_is_refused(change, words):
    with pytest.raises(InputError, match=words):
        dataclasses.replace(_CONFIG, **change)
