"""In: a tiny generator and a city's support days. Out: draws that follow them as a loop by hand does."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpdiff_jax as gpd
from gpdiff_jax.cities import City
from gpdiff_jax.data.target import Target, prepare_target, region_windows
from gpdiff_jax.diffusion.denoiser import denoise
from gpdiff_jax.diffusion.objectives import denoised
from gpdiff_jax.diffusion.schedules import cosine_level
from gpdiff_jax.errors import InputError
from gpdiff_jax.hypernetwork import GenerateConfig, Hypernetwork
from gpdiff_jax.models.loss import masked_huber
from gpdiff_jax.models.protocol import Model
from gpdiff_jax.prompts.prompt import Prompts, region_prompts
from gpdiff_jax.training import parallel
from gpdiff_jax.transfer import posterior, shared
from gpdiff_jax.transfer.adapt_config import AdaptConfig, CodeMoves
from gpdiff_jax.transfer.codes import move_along_directions
from gpdiff_jax.transfer.damped import target_forecast
from gpdiff_jax.transfer.evaluate import sampled_forecast
from gpdiff_jax.transfer.posterior import PosteriorConfig, draw_posterior, posterior_shot
from gpdiff_jax.transfer.shared import add_to_all, city_update
from gpdiff_jax.zoo.tokens import to_tokens
from tests.runs import tiny_settings

_GENERATE = GenerateConfig(samples=2, steps=3, shrinkage=0.7)
_KEY = jax.random.key(5)
_RATE = 90.0


@pytest.fixture(scope="module", name="generator")
def _generator(simulated_cities: list[City]) -> Hypernetwork:
    settings = tiny_settings(pathlib.Path())
    # Regions far enough from each other for a step in latents to be one in forecasts.
    harvest = dataclasses.replace(settings.harvest, steps=40, evaluate_every=10, learning_rate=1e-2)
    how = {"model": "tiny", "data": settings.data, "pooled": settings.pooled, "config": harvest}
    zoo = gpd.harvest_cities(simulated_cities[:2], key=jax.random.key(0), **how)
    return gpd.pretrain(zoo, key=jax.random.key(1), config=settings.pretrain)


@pytest.fixture(scope="module", name="city")
def _city(simulated_cities: list[City], generator: Hypernetwork) -> tuple[Target, Prompts]:
    city = simulated_cities[2]
    target = prepare_target(city, generator.data)
    return target, region_prompts(city, [target.split.support])


def _leaves(params: dict) -> np.ndarray:
    parts = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    return np.concatenate([part.reshape(*part.shape[:2], -1) for part in parts], axis=2)


def _loss(generator: Hypernetwork, target: Target, starts: np.ndarray):
    @jax.jit
    def loss(latent: jax.Array, region: jax.Array) -> jax.Array:
        graph, windows = region_windows(target, region, jnp.asarray(starts))
        forecast = target_forecast(
            generator.model, target, generator.codec.params(latent, _GENERATE.shrinkage), graph, windows
        )
        return masked_huber(forecast, windows.target, windows.mask)

    return loss


def _by_hand(generator, target, prompts, starts, rate: float, own_share: float) -> np.ndarray:
    codec, count = generator.codec, target.num_regions
    mask = jnp.asarray(codec.mask())
    gradient = jax.jit(jax.grad(_loss(generator, target, starts)))
    draws = generator.draws(prompts, 1)
    made = []
    for sample in range(2):
        keys = [jax.random.fold_in(jax.random.fold_in(_KEY, sample), number) for number in prompts.region_ids]
        x = jnp.stack([jax.random.normal(jax.random.split(own)[0], mask.shape) * mask for own in keys])
        for now, then in ((1.0, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0.0)):
            level, after = cosine_level(jnp.float32(now)), cosine_level(jnp.float32(then))
            rows = jnp.full(count, now), jnp.asarray(draws.prompt), jnp.ones(count)
            parts = denoised("v", level, x, denoise(generator.denoiser, generator.variables, x, *rows) * mask[None])
            own = np.stack([gradient(parts.x0[region], jnp.int32(region)) for region in range(count)])
            moved = own_share * own + (1 - own_share) * own.mean(axis=0, keepdims=True)
            x = after.alpha * (parts.x0 - rate * moved) * mask[None] + after.sigma * parts.eps
        made.append(jax.vmap(lambda latent: codec.params(latent, _GENERATE.shrinkage))(x))
    return _leaves(jax.tree.map(lambda *leaves: np.stack(leaves), *made))


@pytest.mark.parametrize(("covariates", "kept"), [("profile", 0.5), ("calendar", 1.0), ("none", 1.0)])
def test_what_is_kept_goes_by_the_covariates_of_the_generator(generator, city, covariates, kept):
    target, prompts = city
    generator = dataclasses.replace(generator, data=dataclasses.replace(generator.data, covariates=covariates))
    drawn, plain = [], []
    for shrinkage in (None, kept, 1.5 - kept):
        config = dataclasses.replace(_GENERATE, shrinkage=shrinkage)
        how = {"key": _KEY, "generate": config, "config": PosteriorConfig(rate=_RATE)}
        drawn.append(_leaves(draw_posterior(generator, target, prompts, **how)))
        plain.append(_leaves(generator.generate(prompts, key=_KEY, config=config).params))
    for made, given, other in (drawn, plain):
        np.testing.assert_array_equal(made, given)
        assert (made != other).any()


@pytest.fixture(name="plain")
def _plain(generator: Hypernetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator's own model reads covariates that are not there without a profile; this one reads none."""

    def apply(params, graph, history, covariates):
        return (params["graph"]["kernel"] @ history[0, :, 0] + params["head"]["bias"])[:, None]

    monkeypatch.setattr(Hypernetwork, "model", Model("plain", generator.model.init, apply))


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(("covariates", "rate"), [("profile", 480.0), ("calendar", 1920.0), ("none", 1920.0)])
def test_the_rate_goes_by_whether_a_profile_is_seen(simulated_cities, generator, covariates, rate):
    target = prepare_target(simulated_cities[2], dataclasses.replace(generator.data, covariates=covariates))
    prompts = region_prompts(simulated_cities[2], [target.split.support])
    drawn = [
        _leaves(draw_posterior(generator, target, prompts, key=_KEY, generate=_GENERATE, config=config))
        for config in (PosteriorConfig(), PosteriorConfig(rate=rate), PosteriorConfig(rate=rate / 2))
    ]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()


def test_where_nothing_is_kept_of_differences_all_are_the_pooled_model(generator, city):
    target, prompts = city
    generate = dataclasses.replace(_GENERATE, shrinkage=0.0)
    drawn = draw_posterior(generator, target, prompts, key=_KEY, generate=generate, config=PosteriorConfig(rate=_RATE))
    pooled = _leaves(jax.tree.map(lambda leaf: np.broadcast_to(leaf, (2, 8, *leaf.shape)), generator.pooled))
    np.testing.assert_allclose(_leaves(drawn), pooled, atol=1e-6)


@pytest.mark.parametrize(("rate", "own_share"), [(0.0, 0.5), (_RATE, 0.25)])
def test_draws_follow_the_support_days_as_by_hand(generator, city, rate, own_share):
    target, prompts = city
    config = PosteriorConfig(rate=rate, own_share=own_share, windows=10)
    drawn = _leaves(draw_posterior(generator, target, prompts, key=_KEY, generate=_GENERATE, config=config))
    everything = np.asarray(target.support_starts)
    picked = everything[np.linspace(0, len(everything) - 1, 10).round().astype(int)]
    share = min(1.0, len(everything) / 55)  # of the windows of three days
    # A third of the way in each of three steps.
    want = _by_hand(generator, target, prompts, picked, rate / 3 * share, own_share)
    np.testing.assert_allclose(drawn, want, rtol=1e-3, atol=1e-5)
    plain = _leaves(generator.generate(prompts, key=_KEY, config=_GENERATE).params)
    if rate:
        assert np.abs(drawn - plain).max() > 3e-3
    else:
        np.testing.assert_allclose(drawn, plain, rtol=1e-4, atol=1e-5)


def test_what_is_drawn_takes_the_steps_that_its_city_shares(generator, city, monkeypatch):
    target, prompts = city
    prior = generator.generate(prompts, key=_KEY, config=_GENERATE).params
    config = PosteriorConfig(rate=_RATE)
    adapt = AdaptConfig(shared_steps=2, shared_rates=(0.2,), shared_folds=0)
    how = {"key": _KEY, "generate": _GENERATE, "config": config}
    made = posterior_shot(generator, target, prompts, prior, adapt=adapt, **how)
    drawn = draw_posterior(generator, target, prompts, key=_KEY, generate=_GENERATE, config=config)
    moved = add_to_all(drawn, city_update(generator.model, target, drawn, steps=2, rate=0.2, key=_KEY))
    want, _ = sampled_forecast(generator.model, target, moved, prior)
    np.testing.assert_allclose(made.forecast, want, rtol=1e-4)
    unmoved, _ = sampled_forecast(generator.model, target, drawn, prior)
    assert np.abs(made.forecast - unmoved).max() > 1e-2
    # Kinds of day that the support lacks are the prior's, if that is asked for as of every other method.
    every = dataclasses.replace(adapt, seen_kinds_only=False)
    of_all = posterior_shot(generator, target, prompts, prior, adapt=every, **how).forecast
    np.testing.assert_allclose(of_all, sampled_forecast(generator.model, target, moved, None)[0], rtol=1e-4)
    assert (of_all != made.forecast).any()
    # How many, and how long, is chosen from the prior, which knows nothing of the support days.
    asked = []
    monkeypatch.setattr(shared, "choose_steps", lambda *given, **how: (asked.append(given[2]), (2, 0.2))[1])
    chosen = posterior_shot(generator, target, prompts, prior, adapt=AdaptConfig(shared_steps=9), **how)
    np.testing.assert_array_equal(chosen.forecast, made.forecast)
    (start,) = asked
    assert start is prior


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(("covariates", "update", "moved"), [
    ("profile", "codes", False), ("calendar", "codes", True), ("none", "codes", True), ("calendar", "shared", False),
])  # fmt: skip
def test_steps_in_codes_follow_where_no_profile_is_seen(simulated_cities, generator, covariates, update, moved):
    target = prepare_target(simulated_cities[2], dataclasses.replace(generator.data, covariates=covariates))
    prompts = region_prompts(simulated_cities[2], [target.split.support])
    prior = generator.generate(prompts, key=_KEY, config=_GENERATE).params
    config, moves = PosteriorConfig(rate=_RATE), CodeMoves(3, 2.0, 0.5)
    given = {f"code_{name}": value for name, value in moves._asdict().items()}
    adapt = AdaptConfig(update=update, shared_steps=2, shared_rates=(0.2,), shared_folds=0, directions=3, **given)
    how = {"key": _KEY, "generate": _GENERATE, "config": config}
    made = posterior_shot(generator, target, prompts, prior, adapt=adapt, **how)
    drawn = draw_posterior(generator, target, prompts, **how)
    want = add_to_all(drawn, city_update(generator.model, target, drawn, steps=2, rate=0.2, key=_KEY))
    if moved:
        directions = jax.tree.map(lambda leaf: leaf[:3], generator.directions)
        along = moves._asdict() | {"most_windows": adapt.code_windows, "rows_side_by_side": 1}
        want = move_along_directions(generator.model, target, want, directions, **along)
    np.testing.assert_allclose(
        made.forecast, sampled_forecast(generator.model, target, want, prior)[0], rtol=1e-4, atol=1e-4
    )
    assert (made.learning_rate, made.steps) == ((2.0, 3) if moved else (None, None))
    assert (made.shared_steps, made.shared_rate) == (2, 0.2)


def test_steps_that_are_far_too_long_leave_latents_that_a_region_may_have(generator, city):
    how = {"generate": dataclasses.replace(_GENERATE, shrinkage=1.0), "config": PosteriorConfig(rate=1e30)}
    drawn = draw_posterior(generator, *city, key=_KEY, **how)
    codec = generator.codec
    latents = jax.vmap(jax.vmap(lambda params: codec.encode(to_tokens(codec.layout, params))))(drawn)
    # The network goes on a little where it is led.
    assert 7.9 < np.abs(latents).max() < 9


def test_what_the_network_itself_thinks_far_off_is_not_cut(generator, city, monkeypatch):
    monkeypatch.setattr(posterior, "_LARGEST_LATENT", 0.1)
    generate = dataclasses.replace(_GENERATE, steps=5)  # a program of its own, which holds the limit
    drawn = _leaves(draw_posterior(generator, *city, key=_KEY, generate=generate, config=PosteriorConfig(rate=0.0)))
    plain = _leaves(generator.generate(city[1], key=_KEY, config=generate).params)
    np.testing.assert_allclose(drawn, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("plain")
def test_without_directions_the_shared_steps_have_to_be_asked_for(simulated_cities, generator):
    generator = dataclasses.replace(generator, directions=None)
    target = prepare_target(simulated_cities[2], dataclasses.replace(generator.data, covariates="calendar"))
    prompts = region_prompts(simulated_cities[2], [target.split.support])
    prior = generator.generate(prompts, key=_KEY, config=_GENERATE).params
    how = {"key": _KEY, "generate": _GENERATE}
    with pytest.raises(InputError, match="steps in codes need the directions of a zoo; without them take"):
        posterior_shot(generator, target, prompts, prior, **how)
    shared_only = AdaptConfig(update="shared", shared_steps=2, shared_folds=0)
    assert posterior_shot(generator, target, prompts, prior, adapt=shared_only, **how).shared_steps == 2


def test_the_error_on_the_support_falls(generator, city):
    target, prompts = city
    loss = _loss(generator, target, np.asarray(target.support_starts))

    def error(rate: float) -> float:
        config = PosteriorConfig(rate=rate)
        drawn = draw_posterior(generator, target, prompts, key=_KEY, generate=_GENERATE, config=config)
        rows = jax.tree.map(lambda leaf: np.asarray(leaf)[0], drawn)
        tokens = [
            generator.codec.encode(
                to_tokens(generator.codec.layout, jax.tree.map(lambda leaf, r=region: leaf[r], rows))
            )
            for region in range(target.num_regions)
        ]
        return float(np.mean([loss(latent, jnp.int32(region)) for region, latent in enumerate(tokens)]))

    plain, followed = error(0.0), error(_RATE)
    assert followed < plain - 1e-3


def test_more_devices_change_nothing_and_neither_does_what_fills_them_up(generator, city, monkeypatch):
    """Seven regions of one sample on two devices: the eighth row is no region, and counts in no mean."""
    devices = jax.local_devices()
    assert len(devices) == 2
    target, prompts = city
    cut = jax.tree.map(lambda leaf: leaf[:7], target.graphs)
    seven = dataclasses.replace(target, graphs=cut, region_ids=target.region_ids[:7])
    some = dataclasses.replace(prompts, values=prompts.values[:, :7], region_ids=prompts.region_ids[:7])
    made = []
    for count in (1, 2):
        monkeypatch.setattr(parallel.jax, "local_devices", lambda count=count: devices[:count])
        how = {"generate": GenerateConfig(samples=1, steps=3), "config": PosteriorConfig(rate=_RATE)}
        made.append(_leaves(draw_posterior(generator, seven, some, key=_KEY, **how)))
    assert made[0].shape[:2] == (1, 7)
    np.testing.assert_allclose(made[1], made[0], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_drawn_is_refused(generator, city):
    target, prompts = city
    with pytest.raises(InputError, match="'euler' needs schedule 'rectified_flow'"):
        draw_posterior(generator, target, prompts, key=_KEY, generate=GenerateConfig(sampler="euler"))
    with pytest.raises(InputError, match=r"`rate` must be a number from 0 to 1e\+30, got -1"):
        PosteriorConfig(rate=-1.0)
    with pytest.raises(InputError, match=r"`own_share` must be in \[0, 1\], got 2"):
        PosteriorConfig(own_share=2.0)
