"""In: prompts of source regions and of a target. Out: how often every source region is trained on."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.diffusion.training import PretrainConfig
from gpdiff_jax.errors import InputError
from gpdiff_jax.pretraining import region_odds
from gpdiff_jax.prompts.prompt import Prompts
from gpdiff_jax.zoo import HeldVectors, ParameterZoo

_CITY = np.array([0] * 6 + [1] * 2)
_NAMES = ("a", "b", "c")


def _prompts(values: np.ndarray) -> Prompts:
    return Prompts(jnp.asarray(values, jnp.float32), jnp.arange(values.shape[1], dtype=jnp.uint32), _NAMES)


def _zoo(values: np.ndarray) -> ParameterZoo:
    """A zoo of whose regions only prompts and cities are looked at."""
    regions = values.shape[1]
    ones, zeros = np.ones((regions, 1), np.float32), np.zeros((regions, 1), np.int32)
    return ParameterZoo(
        **{"model": "none", "base": {}, "vectors": HeldVectors({}), "validation_mae": ones, "start_mae": ones[:, 0]},
        **{"step": zeros, "seed": zeros, "data_window": zeros, "city_index": _CITY, "sources": None},
        prompts=_prompts(values),
        names=tuple(f"r{k}" for k in range(regions)),
    )


@pytest.fixture(name="values")
def _values() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 8, 3))


def _held_out(*regions: int) -> np.ndarray:
    return np.isin(np.arange(8), regions)


def test_every_city_counts_the_same_and_its_regions_alike():
    odds = region_odds(_zoo(np.zeros((1, 8, 3))), _held_out(1, 7), PretrainConfig())
    np.testing.assert_allclose(odds, [0.1, 0, 0.1, 0.1, 0.1, 0.1, 0.5, 0])


def test_a_region_like_the_target_is_drawn_more_often_and_a_wide_kernel_forgets_it(values):
    zoo, like = _zoo(values), _prompts(values[:1, [4]])
    narrow, usual, wide = (
        region_odds(zoo, _held_out(0), PretrainConfig(likeness_width=width), like) for width in (0.01, 1.0, 1e4)
    )
    # Two variants: in the one that the target repeats, its region is at no distance.
    assert narrow.argmax() == 4 and narrow[4] > 0.999
    balanced = region_odds(zoo, _held_out(0), PretrainConfig())
    assert usual[4] > 1.2 * balanced[4] and usual[0] == 0
    np.testing.assert_allclose(wide, balanced, rtol=1e-5)
    for odds in (narrow, usual, wide):
        assert odds.sum() == pytest.approx(1)


def test_every_region_of_the_target_has_one_vote_and_one_that_tells_nothing_has_none(values):
    zoo, config = _zoo(values), PretrainConfig(likeness_width=0.3)
    both = _prompts(values[:1, [2, 7]])
    alone = [region_odds(zoo, _held_out(), config, _prompts(values[:1, [row]])) for row in (2, 7)]
    np.testing.assert_allclose(region_odds(zoo, _held_out(), config, both), np.mean(alone, axis=0), rtol=1e-5)
    half = dataclasses.replace(both, told=jnp.array([True, False]))
    np.testing.assert_allclose(region_odds(zoo, _held_out(), config, half), alone[0], rtol=1e-5)


def test_repeats_of_a_region_do_not_make_its_city_count_more():
    values = np.zeros((1, 8, 3))
    values[:, 6:] = 1.0  # city 0 six times one region, city 1 twice another
    odds = region_odds(_zoo(values), _held_out(), PretrainConfig(), _prompts(np.full((1, 1, 3), 0.5)))
    np.testing.assert_allclose([odds[:6].sum(), odds[6:].sum()], [0.5, 0.5], rtol=1e-5)


def test_prompts_far_from_all_sources_still_choose_the_nearest(values):
    zoo = _zoo(values)
    odds = region_odds(zoo, _held_out(), PretrainConfig(likeness_width=1e-3), _prompts(np.full((1, 1, 3), 9.0)))
    assert np.isfinite(odds).all() and odds.max() > 0.999


def test_prompts_that_are_not_comparable_are_refused(values):
    zoo, like = _zoo(values), _prompts(values[:1])
    with pytest.raises(InputError, match="have other parts; make both with one encoder"):
        region_odds(zoo, _held_out(), PretrainConfig(), dataclasses.replace(like, names=("a", "b", "x")))
    with pytest.raises(InputError, match="`like` tells nothing of any region"):
        region_odds(zoo, _held_out(), PretrainConfig(), like.null)
