"""In: cities of source regions, some held out. Out: how often every region is trained on, and their tokens."""

import jax
import numpy as np

from gpdiff_jax import pretraining
from gpdiff_jax.pretraining import region_probabilities
from gpdiff_jax.zoo.tokens import make_layout
from tests.compilations import programs_made


def test_every_city_counts_the_same_and_its_regions_alike():
    city, held_out = np.array([0] * 6 + [1] * 2), np.isin(np.arange(8), [1, 7])
    np.testing.assert_allclose(region_probabilities(city, held_out), [0.1, 0, 0.1, 0.1, 0.1, 0.1, 0.5, 0])


def test_a_city_that_is_held_out_whole_leaves_the_others_all():
    city, held_out = np.array([0, 0, 1, 1, 1]), np.array([True, True, False, False, False])
    np.testing.assert_allclose(region_probabilities(city, held_out), [0, 0, 1 / 3, 1 / 3, 1 / 3])


def test_parts_of_like_sizes_share_a_program_and_what_fills_them_up_is_cut_off():
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(8, 3, 2)).astype(np.float32)}
    layout = make_layout(jax.tree.map(lambda leaf: leaf[0], params), 4)
    whole = pretraining.tokens_of(layout, params)
    with programs_made() as made:
        for count in (5, 7, 8):
            part = pretraining.tokens_of(layout, jax.tree.map(lambda leaf, count=count: leaf[:count], params))
            np.testing.assert_array_equal(part, whole[:count])
    assert not made
    assert set(params["kernel"][4].ravel()) <= set(whole[4].ravel())
