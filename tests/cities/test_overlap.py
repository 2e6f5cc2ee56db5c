"""In: a city, and copies of it under other names. Out: where both hold the same readings, and nothing by chance."""

import dataclasses

import numpy as np
import pytest

from gpdiff_jax.cities import City
from gpdiff_jax.cities.overlap import _hashes, find_overlap


def _copy(city: City, steps: slice, nodes: list[int]) -> City:
    """Some regions of a city in another order, over some of its time, without edges."""
    none = np.zeros(0, np.int32)
    return dataclasses.replace(
        city,
        name="copy",
        values=np.array(city.values[steps][:, nodes]),
        node_ids=tuple(f"other{k}" for k in range(len(nodes))),
        senders=none,
        receivers=none,
        weights=np.zeros(0, np.float32),
        latitude=None,
        longitude=None,
        start=None,
    )


@pytest.mark.parametrize(
    ("steps", "nodes"),
    [(slice(None), list(range(8))), (slice(100, 200), [5]), (slice(7, None), [7, 6, 5, 4, 3, 2, 1, 0])],
    ids=["whole", "one region, four days", "another order and begin"],
)
def test_a_copy_is_recognised_whatever_its_name_order_or_begin(simulated_cities, steps, nodes):
    city = simulated_cities[0]
    found = find_overlap(city, _copy(city, steps, nodes))
    assert found is not None
    assert nodes[found.other_node] == found.node and found.other_step + (steps.start or 0) == found.step
    missing = np.array(city.values)
    missing[::30] = np.nan
    found = find_overlap(dataclasses.replace(city, values=missing), _copy(city, steps, nodes))
    assert found is not None and nodes[found.other_node] == found.node


def test_other_cities_and_dull_stretches_are_no_copies(simulated_cities):
    first, second, third = simulated_cities
    assert find_overlap(first, second) is None and find_overlap(second, third) is None
    # The same city in another year, as it were: nothing of one is in the other.
    assert find_overlap(_copy(first, slice(0, 150), [0, 1]), _copy(first, slice(150, None), [0, 1])) is None
    quiet = dataclasses.replace(first, values=np.where(np.array(first.values) > 0, 0.0, 0.0).astype(np.float32))
    assert find_overlap(quiet, quiet) is None
    few = dataclasses.replace(first, values=np.array(first.values) % 5)
    assert find_overlap(few, few) is None  # seven values or fewer may fall together by chance
    assert find_overlap(first, _copy(first, slice(0, 20), [0])) is None  # shorter than a stretch


def test_every_window_has_the_hash_of_its_readings_alone(simulated_cities):
    values = simulated_cities[0].values[:, :, 0]
    moved = np.concatenate([values[:5] + 1, values])
    np.testing.assert_array_equal(_hashes(values), _hashes(moved)[5:])
    assert len(np.unique(_hashes(values))) == _hashes(values).size
