"""In: small graphs.
Out: that their drawings keep what the graphs say.
"""

import numpy as np
import pytest

from gpdiff_jax.errors import InputError
from gpdiff_jax.report import layout


def _distances(positions):
    return np.sqrt(((positions[:, None] - positions[None]) ** 2).sum(-1))


def test_a_path_is_drawn_straight_with_unit_steps():
    edges = np.array([[0, 1], [1, 2], [2, 3], [3, 4]])
    np.testing.assert_allclose(
        _distances(layout.graph_layout(edges, 5)), np.abs(np.subtract.outer(range(5), range(5))), atol=0.05
    )


def test_a_ring_is_drawn_round():
    count = 12
    edges = np.stack([np.arange(count), (np.arange(count) + 1) % count], axis=1)
    positions = layout.graph_layout(edges, count)
    radius = np.linalg.norm(positions - positions.mean(axis=0), axis=1)
    np.testing.assert_allclose(radius, radius.mean(), rtol=0.02)


def test_direction_and_order_of_edges_do_not_matter():
    rng = np.random.default_rng(0)
    edges = rng.integers(0, 15, (22, 2))
    mixed = rng.permutation(edges[:, ::-1])
    np.testing.assert_allclose(layout.graph_layout(edges, 15), layout.graph_layout(mixed, 15), atol=1e-9)


def test_parts_lie_apart_and_nobody_coincides():
    edges = np.array([[0, 1], [1, 2], [2, 0], [4, 5], [7, 8], [8, 9], [9, 10], [8, 11], [8, 12]])
    positions = layout.graph_layout(edges, 14)
    assert np.isfinite(positions).all()
    parts = [[0, 1, 2], [3], [4, 5], [6], [7, 8, 9, 10, 11, 12], [13]]
    distances = _distances(positions)
    assert distances[~np.eye(14, dtype=bool)].min() > 0.3
    for a in parts:
        for b in (b for b in parts if b is not a):
            apart = np.maximum(
                positions[a].min(axis=0) - positions[b].max(axis=0), positions[b].min(axis=0) - positions[a].max(axis=0)
            )
            assert apart.max() > 0.9


@pytest.mark.parametrize("regions", [0, 1, 2, 5])
def test_graphs_without_edges(regions):
    positions = layout.graph_layout(np.zeros((0, 2), np.int32), regions)
    assert positions.shape == (regions, 2) and len(np.unique(positions, axis=0)) == regions


def test_an_edge_to_nowhere_is_refused():
    with pytest.raises(InputError, match="from 0 to 3, but there are 3"):
        layout.graph_layout(np.array([[0, 3]]), 3)


def test_a_degree_of_longitude_shrinks_with_latitude():
    projected = layout.project_coordinates(np.array([[10.0, 60.0], [11.0, 60.0], [10.0, 60.0]]))
    np.testing.assert_allclose(projected[1] - projected[0], [0.5, 0.0], atol=1e-9)
