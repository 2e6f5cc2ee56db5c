"""In: simulated cities and spans. Out: prompts of the right regions and spans, and their scale over the sources."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.cities.splits import Span, split_target
from gpdiff_jax.errors import InputError
from gpdiff_jax.prompts.prompt import (
    Prompts,
    PromptScaler,
    fit_prompt_scaler,
    in_scale,
    region_prompts,
    scale_of,
    scale_prompts,
    source_prompts,
    target_prompts,
)
from gpdiff_jax.prompts.statistics import spatial_statistics, temporal_statistics


def test_a_prompt_is_the_temporal_statistics_of_its_span_and_the_spatial_ones(simulated_cities):
    city, spans = simulated_cities[0], [Span(0, 72), Span(50, 122)]
    made = region_prompts(city, spans)
    spatial, spatial_names = spatial_statistics(city)
    for variant, span in enumerate(spans):
        temporal, names = temporal_statistics(city, span)
        np.testing.assert_array_equal(made.values[variant], np.concatenate([temporal, spatial], axis=1))
        assert made.names == names + spatial_names


def test_prompts_of_a_target_are_those_of_its_support_days(simulated_cities):
    city = simulated_cities[1]
    split = split_target(city.num_steps, 24, 3, history=12, horizon=6)
    made, expected = target_prompts(city, support_days=3), region_prompts(city, [split.support])
    np.testing.assert_array_equal(made.values, expected.values)
    assert made.names == expected.names and made.values.shape[:2] == (1, 8)
    assert (np.asarray(target_prompts(city, support_days=4).values) != np.asarray(made.values)).any()


def test_source_prompts_line_up_cities_and_leave_silent_regions_out(simulated_cities):
    first, second = simulated_cities[:2]
    values = np.array(second.values)
    values[:200, 3] = np.nan
    second = dataclasses.replace(second, values=values)
    spans = [[Span(0, 72), Span(40, 112)], [Span(10, 82), Span(90, 162)]]
    made = source_prompts([first, second], spans, [Span(0, 200)] * 2)
    assert made.values.shape[:2] == (2, 15)
    np.testing.assert_array_equal(made.values[:, :8], region_prompts(first, spans[0]).values)
    kept = [0, 1, 2, 4, 5, 6, 7]
    np.testing.assert_array_equal(made.values[:, 8:], np.asarray(region_prompts(second, spans[1]).values)[:, kept])
    np.testing.assert_array_equal(made.region_ids, np.concatenate([first.region_ids(), second.region_ids()[kept]]))
    assert made.provenance == ("crowd_0 steps 0 to 72, 40 to 112", "crowd_1 steps 10 to 82, 90 to 162")
    with pytest.raises(InputError, match="`cities` is empty"):
        source_prompts([], [], [])


def test_the_parts_of_a_prompt_are_told_by_the_names_of_its_entries():
    names = ("spatial_000", "degree", "temporal_000", "temporal_share", "spatial_001")
    prompts = Prompts(jnp.zeros((1, 2, 5)), jnp.arange(2, dtype=jnp.uint32), names)
    assert {part: list(entries) for part, entries in prompts.parts.items()} == {
        "statistics": [1, 3],
        "temporal": [2],
        "spatial": [0, 4],
    }
    assert list(prompts.null.mask) == [False, False] and prompts.mask is None


def test_the_scale_weighs_every_city_alike():
    rng = np.random.default_rng(0)
    city_index = np.array([0] * 90 + [1] * 10)
    values = rng.normal(size=(3, 100, 2)).astype(np.float32)
    values[:, 90:] += np.float32(10)
    scaler = fit_prompt_scaler(Prompts(jnp.asarray(values), jnp.arange(100, dtype=jnp.uint32), ("a", "b")), city_index)
    cities = [values[:, city_index == k].reshape(-1, 2) for k in range(2)]
    mean = (cities[0].mean(axis=0) + cities[1].mean(axis=0)) / 2
    variance = sum(np.square(city - mean).mean(axis=0) for city in cities) / 2
    np.testing.assert_allclose(scaler.mean, mean, rtol=1e-4)
    np.testing.assert_allclose(scaler.std, np.sqrt(variance) + 1e-3, rtol=1e-4)


def test_scaled_prompts_are_cut_at_four_deviations():
    scaler = PromptScaler(jnp.asarray([1.0, 0.0]), jnp.asarray([2.0, 0.5]))
    prompts = Prompts(jnp.asarray([[[5.0, 1.0], [100.0, -9.0]]]), jnp.arange(2, dtype=jnp.uint32), ("a", "b"))
    scaled = scale_prompts(prompts, scaler)
    np.testing.assert_allclose(scaled, [[[2.0, 2.0], [4.0, -4.0]]])


def test_too_many_support_days_are_refused(simulated_cities):
    with pytest.raises(InputError, match=r"`support_days` \(=10\) is longer than the 9.8 days"):
        target_prompts(simulated_cities[0], support_days=10)


@pytest.mark.parametrize("same", [np.log(3.0), np.log(14.0), 2 / 7, 1e4])
def test_an_entry_that_is_the_same_in_all_sources_says_nothing_of_a_target_where_it_is_another(same):
    values = np.random.default_rng(0).normal(size=(12, 1000, 3)).astype(np.float32)
    values[..., 1] = same
    scale = scale_of(values, np.arange(1000, dtype=np.int32) % 3)
    assert np.isinf(scale[1][1]) and np.isfinite(scale[1][[0, 2]]).all()
    other = values + np.asarray([0.0, 5.0, 0.0], np.float32)
    np.testing.assert_array_equal(in_scale(other, scale), in_scale(values, scale))
