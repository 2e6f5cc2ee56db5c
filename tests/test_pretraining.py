"""In: cities of source regions, some held out. Out: how often every region is trained on."""

import numpy as np

from gpdiff_jax.pretraining import region_probabilities


def test_every_city_counts_the_same_and_its_regions_alike():
    city, held_out = np.array([0] * 6 + [1] * 2), np.isin(np.arange(8), [1, 7])
    np.testing.assert_allclose(region_probabilities(city, held_out), [0.1, 0, 0.1, 0.1, 0.1, 0.1, 0.5, 0])


def test_a_city_that_is_held_out_whole_leaves_the_others_all():
    city, held_out = np.array([0, 0, 1, 1, 1]), np.array([True, True, False, False, False])
    np.testing.assert_allclose(region_probabilities(city, held_out), [0, 0, 1 / 3, 1 / 3, 1 / 3])
