"""In: two parts of a graph that no path joins. Out: hops within each, and districts that begin at a part's middle."""

import numpy as np
import pytest

from gpdiff_jax.cities import City
from gpdiff_jax.cities.hops import hops_between
from gpdiff_jax.prompts.urban_graph.relations import district_clusters

_SENDERS, _RECEIVERS = (
    np.array([0, 1, 2, 3, 5], np.int32),
    np.array([1, 2, 3, 4, 6], np.int32),
)  # a line of five, a pair


def test_hops_are_counted_within_a_part_and_what_is_apart_is_what_one_asks_for():
    linked = np.zeros((7, 7), bool)
    linked[_SENDERS, _RECEIVERS] = linked[_RECEIVERS, _SENDERS] = True
    hops = hops_between(linked)
    np.testing.assert_array_equal(hops[0], [0, 1, 2, 3, 4, np.inf, np.inf])
    np.testing.assert_array_equal(hops_between(linked, apart=7.0)[6], [7, 7, 7, 7, 7, 1, 0])
    np.testing.assert_array_equal(hops, hops.T)


def test_the_districts_of_a_city_in_parts_begin_at_the_region_nearest_to_the_others():
    values, names = np.ones((24, 7, 1), np.float32), tuple(f"r{k}" for k in range(7))
    city = City("parts", "crowd", values, _SENDERS, _RECEIVERS, np.ones(5, np.float32), 60, None, ("visits",), names)
    # Centres: r2, the middle of the line; r5 of the other part; then the ends of the line.
    np.testing.assert_array_equal(district_clusters(city, 2), [2, 0, 0, 0, 3, 1, 1])


@pytest.mark.parametrize("share", [0.0, 0.02, 0.05, 0.3])
@pytest.mark.parametrize("count", [1, 9, 70])
def test_hops_are_the_shortest_paths_of_few_links_and_of_many_in_both_directions(count, share):
    linked = np.random.default_rng(count).random((count, count)) < share
    np.fill_diagonal(linked, False)
    shortest = np.where(linked, 1.0, np.inf)
    np.fill_diagonal(shortest, 0.0)
    for middle in range(count):  # Floyd and Warshall's
        shortest = np.minimum(shortest, shortest[:, middle, None] + shortest[None, middle])
    np.testing.assert_array_equal(hops_between(linked), shortest)
