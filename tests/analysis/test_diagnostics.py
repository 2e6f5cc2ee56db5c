"""In: latents and generators made to collapse, copy, ignore their prompt or follow it. Out: the numbers say so."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.analysis.diagnostics import (
    DiagnosticsConfig,
    PromptedTarget,
    compare_latents,
    diagnose,
    effective_rank,
    nearest_distance,
    pairwise_correlation,
    root_mean_square,
)
from gpdiff_jax.analysis.shuffled_prompts import shuffle
from gpdiff_jax.cities import City
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.data.sources import prepare_sources
from gpdiff_jax.data.target import Target, prepare_target
from gpdiff_jax.diffusion.denoiser import DenoiserConfig
from gpdiff_jax.errors import InputError
from gpdiff_jax.hypernetwork import GenerateConfig, Hypernetwork
from gpdiff_jax.models import Model, ModelSizes, registry
from gpdiff_jax.prompts.prompt import Prompts, PromptScaler
from gpdiff_jax.prompts.sources import with_prompts
from gpdiff_jax.region_parameters import RegionParameters
from gpdiff_jax.zoo.codec import fit_codec
from gpdiff_jax.zoo.parameter_zoo import HeldVectors, ParameterZoo
from gpdiff_jax.zoo.tokens import make_layout, to_tokens

_DATA = DataConfig(covariates="none", variants=3, max_neighbours=2)
_CONFIG = DiagnosticsConfig(generate=GenerateConfig(samples=3), shuffles=4, variants=2)
_NAMES = ("place", "city")


def test_white_noise_has_full_rank_and_equal_codes_have_none():
    rng = np.random.default_rng(0)
    assert effective_rank(rng.normal(size=(4000, 12))) == pytest.approx(12, rel=0.01)
    line = np.outer(rng.normal(size=50), rng.normal(size=12))
    assert effective_rank(line.astype(np.float32)) == pytest.approx(1, abs=0.01)
    assert effective_rank(np.full((50, 12), 3.1, np.float32)) == 0.0
    # Three orthogonal directions, two as strong and one a quarter of them: shares 4/9, 4/9, 1/9.
    columns = np.linalg.qr(rng.normal(size=(60, 4)) - 0.0)[0]
    columns = np.linalg.qr(np.column_stack([np.ones(60), columns[:, :3]]))[0][:, 1:]
    entropy = -(2 * 4 / 9 * np.log(4 / 9) + 1 / 9 * np.log(1 / 9))
    assert effective_rank(columns * [4.0, 4.0, 1.0]) == pytest.approx(np.exp(entropy))


@pytest.mark.parametrize("entries", [2**24, 30])
def test_copies_of_the_zoo_are_at_distance_zero_and_others_where_a_loop_finds_them(monkeypatch, entries):
    monkeypatch.setattr("gpdiff_jax.analysis.diagnostics._ENTRIES", entries)
    rng = np.random.default_rng(0)
    training = rng.normal(size=(7, 2, 5)).astype(np.float32)
    assert (nearest_distance(training[3:5, 1], training) == 0).all()
    latents = rng.normal(size=(4, 5)).astype(np.float32)
    left_out = np.array([2, 0, 6, 2])
    for i, latent in enumerate(latents):
        gaps = np.linalg.norm(training.astype(np.float64) - latent, axis=2)
        assert nearest_distance(latents, training)[i] == pytest.approx(gaps.min())
        assert nearest_distance(latents, training, left_out)[i] == pytest.approx(np.delete(gaps, left_out[i], 0).min())


def test_pairwise_distances_correlate_as_their_loop_says(monkeypatch):
    rng = np.random.default_rng(0)
    prompts, latents = rng.normal(size=(9, 3)), rng.normal(size=(9, 4))
    pairs = [(i, j) for i in range(9) for j in range(i)]
    both = [[float(np.linalg.norm(rows[i] - rows[j])) for i, j in pairs] for rows in (prompts, latents)]
    assert pairwise_correlation(prompts, latents) == pytest.approx(np.corrcoef(both)[0, 1])
    turned = 3 * prompts @ np.linalg.qr(rng.normal(size=(3, 3)))[0] + 1
    assert pairwise_correlation(prompts, turned) == pytest.approx(1)
    assert pairwise_correlation(prompts, np.ones((9, 4))) is None
    assert pairwise_correlation(prompts[:2], latents[:2]) is None
    monkeypatch.setattr("gpdiff_jax.analysis.diagnostics._ROWS", 5)
    some = slice(0, 9, 2)
    assert pairwise_correlation(prompts, latents) == pairwise_correlation(prompts[some], latents[some])


def test_memorised_collapsed_and_faithful_codes_are_told_apart():
    rng = np.random.default_rng(0)
    prompts = rng.normal(size=(40, 6))
    training = (prompts @ rng.normal(size=(6, 8)))[:, None] + 0.01 * rng.normal(size=(40, 3, 8))
    best = training[:, 0]
    copied = compare_latents(np.stack([best, best]), prompts, training, best, own=True)
    assert copied["nearest"] == 0 and copied["sample_rms"] == 0
    assert copied["rms"] == copied["harvested_rms"] == pytest.approx(root_mean_square(best))
    assert copied["effective_rank"] == copied["harvested_effective_rank"] == pytest.approx(6, abs=1)
    assert copied["correlation"] == copied["harvested_correlation"] and copied["correlation"] > 0.8
    # A region's own other vectors are no neighbours of it.
    gaps = np.linalg.norm(best[:, None] - best[None], axis=2) + np.where(np.eye(40) > 0, np.inf, 0)
    assert copied["harvested_nearest"] == pytest.approx(np.median(gaps.min(axis=1)), rel=0.05)
    flat = compare_latents(np.zeros((1, 40, 8)), prompts, training, best, own=True)
    assert (flat["rms"], flat["effective_rank"], flat["correlation"], flat["sample_rms"]) == (0, 0, None, None)
    target = compare_latents(rng.normal(size=(2, 10, 8)), prompts[:10], training, None, own=False)
    assert not any(name.startswith("harvested") for name in target) and target["regions"] == 10
    assert target["nearest"] > 0.5 and target["sample_rms"] == pytest.approx(np.sqrt(0.5), rel=0.2)


def test_a_shuffle_moves_every_region_and_keeps_it_in_its_group():
    groups = np.array([0, 0, 1, 1, 1, 1, 2, 0])
    orders = [shuffle(groups, key=jax.random.key(k)) for k in range(5)]
    for order in orders:
        assert sorted(order) == list(range(8)) and (groups[order] == groups).all()
        assert (order != np.arange(8)).tolist() == [True] * 6 + [False, True]
    assert len({tuple(order) for order in orders}) > 1


@functools.cache
def _make_teller(sizes: ModelSizes) -> Model:
    """Is wrong by how far its one parameter is from the region's place in the list of regions."""

    def init(key, graph, history, covariates):
        del key, graph, history, covariates
        return {"place": jnp.zeros(1)}

    def apply(params, graph, history, covariates):
        del history, covariates
        miss = 20.0 * (params["place"][0] - graph.nodes[0].astype(jnp.float32))
        return jnp.broadcast_to(miss, (sizes.horizon, 1))

    return Model("teller", init, apply)


@pytest.fixture(scope="module", autouse=True)
def _teller_is_registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._REGISTRY, "teller", _make_teller)
        yield


@dataclasses.dataclass(frozen=True, eq=False)
class _Known(Hypernetwork):
    """A generator that is known: it answers with the place in the prompt, with the city alone, or with the middle."""

    follows: str = "place"

    def generate(self, prompts: Prompts, *, key: Any, config: GenerateConfig = GenerateConfig()) -> RegionParameters:
        del key
        shown = {"place": prompts.values[0, :, 0], "city": 8 * prompts.values[0, :, 1] + 3.5}
        place = shown.get(self.follows, jnp.full(prompts.values.shape[1], 7.5))
        drift = 0.25 * (jnp.arange(config.samples, dtype=jnp.float32) - 1)
        return RegionParameters({"place": (place[None] + drift[:, None])[..., None]}, "teller", self.data)


@pytest.fixture(scope="module", name="zoo")
def _zoo(simulated_cities: list[City]) -> ParameterZoo:
    cities = simulated_cities[:2]
    sources = with_prompts(prepare_sources(cities, _DATA, key=jax.random.key(0), validation_windows=4), cities)
    place = np.arange(16, dtype=np.float32)
    described = np.repeat(np.stack([place, np.asarray(sources.city_index, np.float32)], axis=1)[None], 3, axis=0)
    return ParameterZoo(
        model="teller",
        pooled={"place": np.full(1, 7.5, np.float32)},
        vectors=HeldVectors({"place": np.stack([place, place + 0.1], axis=1)[..., None]}),
        validation_mae=np.ones((16, 2), np.float32),
        start_mae=np.ones(16, np.float32),
        step=np.ones((16, 2), np.int32),
        seed=np.zeros((16, 2), np.int32),
        data_window=np.zeros((16, 2), np.int32),
        prompts=Prompts(jnp.asarray(described), sources.region_ids, _NAMES),
        names=sources.names,
        city_index=np.asarray(sources.city_index),
        sources=sources,
    )


def _generator(zoo: ParameterZoo, follows: str) -> _Known:
    layout = make_layout(zoo.pooled, 2)
    tokens = np.asarray(jax.vmap(functools.partial(to_tokens, layout))({"place": zoo.params["place"][:, 0]}))
    assert zoo.sources is not None
    return _Known(
        model_name="teller",
        sizes=zoo.sources.sizes,
        data=_DATA,
        denoiser_config=DenoiserConfig(),
        variables={},
        codec=fit_codec(layout, np.asarray(to_tokens(layout, zoo.pooled)), tokens, np.ones(16), 0),
        prompt_scaler=PromptScaler(jnp.zeros(2), jnp.full(2, 4.0)),
        prompt_names=_NAMES,
        follows=follows,
    )


_HELD_OUT = np.isin(np.arange(16), [2, 6, 9, 12])


@pytest.fixture(scope="module", name="target")
def _target(simulated_cities: list[City]) -> Target:
    return prepare_target(simulated_cities[2], _DATA)


def _diagnose(zoo: ParameterZoo, target: Target, follows: str) -> dict[str, Any]:
    described = np.stack([np.arange(8, dtype=np.float32), np.zeros(8, np.float32)], axis=1)
    shown = PromptedTarget(
        "c", target, Prompts(jnp.asarray(described[None]), target.region_ids, _NAMES), jax.random.key(1)
    )
    return diagnose(zoo, _generator(zoo, follows), _HELD_OUT, [shown], key=jax.random.key(0), config=_CONFIG)


def test_a_generator_that_follows_its_prompt_loses_when_prompts_are_shuffled(zoo, target):
    found = _diagnose(zoo, target, "place")
    held_out, aimed = found["response"]["held_out"], found["response"]["c"]
    for part in (held_out, aimed):
        assert part["rise"] > 500 and part["shuffled"] == pytest.approx(part["error"] * (1 + part["rise"] / 100))
        assert part["rise_deviation"] > 0 and part["pooled"] > 10 * part["error"]
    # Regions of the other city are further away in the list.
    assert held_out["rise_across"] > held_out["rise"]
    assert held_out["harvested"] == pytest.approx(held_out["error"], rel=1e-4)
    # Samples 0.25 apart, times 20, in deviations of the region.
    assert held_out["spread"] == pytest.approx(20 * np.std([-0.25, 0, 0.25]), rel=1e-3)
    groups = found["groups"]
    assert (groups["training"]["regions"], groups["held_out"]["regions"], groups["c"]["regions"]) == (12, 4, 8)
    assert groups["training"]["correlation"] > 0.9 and groups["c"]["correlation"] == pytest.approx(1, abs=1e-3)
    # The middle sample of a trained region is its vector; the others lie 0.15 from its second one or 0.25 from both.
    spread = float(np.sqrt(np.square(np.arange(16) - 7.5).mean()))
    assert groups["training"]["nearest"] == pytest.approx(0.15 / spread, rel=1e-3)
    assert groups["training"]["harvested_nearest"] == pytest.approx(0.9 / spread, rel=0.2)


def test_a_generator_that_ignores_its_prompt_does_not(zoo, target):
    found = _diagnose(zoo, target, "nothing")
    for part in found["response"].values():
        assert part["rise"] == part["rise_deviation"] == 0 and part["shuffled"] == part["error"]
        assert part["error"] == pytest.approx(part["pooled"], rel=1e-5)
    assert found["response"]["held_out"]["rise_across"] == 0
    assert all(group["correlation"] is None and group["effective_rank"] == 0 for group in found["groups"].values())


def test_a_generator_that_tells_cities_apart_only_loses_across_cities_only(zoo, target):
    held_out = _diagnose(zoo, target, "city")["response"]["held_out"]
    assert held_out["rise"] == 0 and held_out["rise_across"] > 20


def test_the_test_span_of_a_target_is_not_read_and_its_support_days_are(zoo, target, simulated_cities):
    def with_other(begin: int, end: int) -> dict[str, Any]:
        values = np.array(simulated_cities[2].values)
        values[begin:end] = values[begin:end] * 3 + 100
        city = dataclasses.replace(simulated_cities[2], values=values)
        return _diagnose(zoo, prepare_target(city, _DATA), "place")

    first, last = target.split.support.start, target.split.support.stop
    assert with_other(last, 336) == _diagnose(zoo, target, "place")
    assert with_other(first, last)["response"]["c"] != with_other(last, 336)["response"]["c"]


def test_what_was_not_observed_is_none(zoo, target):
    blind = dataclasses.replace(target, bank=dataclasses.replace(target.bank, observed=0 * target.bank.observed))
    found = _diagnose(zoo, blind, "place")["response"]["c"]
    assert set(found.values()) == {None}
    short = dataclasses.replace(target, support_starts=target.support_starts[:0])
    assert set(_diagnose(zoo, short, "place")["response"]["c"].values()) == {None}


def test_a_diagnosis_needs_both_kinds_of_regions_and_the_sources(zoo):
    generator, key = _generator(zoo, "place"), jax.random.key(0)
    with pytest.raises(InputError, match="0 of 16 source regions were held out"):
        diagnose(zoo, generator, np.zeros(16, bool), [], key=key)
    with pytest.raises(InputError, match="16 of 16 source regions were held out"):
        diagnose(zoo, generator, np.ones(16, bool), [], key=key)
    with pytest.raises(InputError, match="the zoo has no sources attached"):
        diagnose(dataclasses.replace(zoo, sources=None), generator, _HELD_OUT, [], key=key)
    with pytest.raises(InputError, match="`shuffles` must be at least 1, got 0"):
        DiagnosticsConfig(shuffles=0)
