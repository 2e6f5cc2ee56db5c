"""In: small graphs. Out: the ego graph of every region, worked out edge by edge, and what flows into its centre."""

import dataclasses

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import pytest

from gpdiff_jax.cities import City
from gpdiff_jax.data.region_graphs import region_graphs
from gpdiff_jax.errors import InputError
from gpdiff_jax.models.graphs import centre_weights, diffusion_walks, edge_mask, node_mask
from tests.tiny import town

_STAR = town([(1, 0, 0.2), (0, 2, 0.9), (3, 0, 0.2), (0, 4, 0.1), (1, 2, 1.0), (4, 3, 0.5)], 5)
_PAIR = town([(0, 1, 0.3)], 2, name="pair")


def _unpadded(graph) -> tuple[list[int], set[tuple[int, int, float]]]:
    """Nodes in order and edges between bank numbers."""
    nodes = np.asarray(graph.nodes)[np.asarray(node_mask(graph))].tolist()
    real = np.asarray(edge_mask(graph))
    ends = zip(
        np.asarray(graph.senders)[real], np.asarray(graph.receivers)[real], np.asarray(graph.edges)[real], strict=True
    )
    return nodes, {(nodes[s], nodes[r], round(float(w), 6)) for s, r, w in ends}


def _row(graphs, region: int):
    return jax.tree.map(lambda leaf: leaf[region], graphs)


def test_an_ego_graph_holds_the_neighbours_of_either_direction_and_every_edge_among_them():
    graphs = region_graphs([_STAR, _PAIR], max_neighbours=8)
    assert _unpadded(_row(graphs, 0)) == (
        [0, 1, 2, 3, 4],
        {(1, 0, 0.2), (0, 2, 0.9), (3, 0, 0.2), (0, 4, 0.1), (1, 2, 1.0), (4, 3, 0.5)},
    )
    assert _unpadded(_row(graphs, 1)) == ([1, 0, 2], {(1, 0, 0.2), (0, 2, 0.9), (1, 2, 1.0)})
    # The second city's nodes are numbered on from the first's.
    assert _unpadded(_row(graphs, 6)) == ([6, 5], {(5, 6, 0.3)})
    assert graphs.nodes.shape == (7, 6) and graphs.edges.shape == (7, 7)
    # Spare nodes repeat the centre, so that reading them off the bank is safe; spare edges weigh nothing.
    for region in range(7):
        graph = _row(graphs, region)
        assert set(np.asarray(graph.nodes)[~np.asarray(node_mask(graph))].tolist()) == {region}
        np.testing.assert_array_equal(np.asarray(graph.edges)[~np.asarray(edge_mask(graph))], 0)


def test_a_crowded_region_keeps_the_strongest_edges_into_it_then_out_of_it_and_ties_go_by_number():
    nodes = {k: _unpadded(_row(region_graphs([_STAR], max_neighbours=k), 0))[0] for k in range(5)}
    assert nodes == {0: [0], 1: [0, 1], 2: [0, 1, 3], 3: [0, 1, 3, 2], 4: [0, 1, 2, 3, 4]}


def test_a_random_pick_depends_on_the_seed_and_the_regions_own_id_alone():
    edges = [(0, k, 0.5) for k in range(1, 20)]
    city = town(edges, 20)

    def picked(cities: list[City], seed: int) -> list[int]:
        graph = _row(region_graphs(cities, max_neighbours=5, pick="random", seed=seed), -20)
        nodes = _unpadded(graph)[0]
        return [node - nodes[0] for node in nodes]

    first = picked([city], 0)
    assert len(first) == 6 and first[0] == 0 and first[1:] == sorted(set(first[1:]))
    assert picked([_STAR, city], 0) == first == picked([dataclasses.replace(city, name="other")], 0)
    assert len({tuple(picked([city], seed)) for seed in range(5)}) > 1


@pytest.mark.parametrize("most", [0, 2, 8])
def test_centre_weights_are_the_centres_row_of_the_normalised_adjacency(most):
    graphs = region_graphs([_STAR, _PAIR], max_neighbours=most)
    weights = np.asarray(jax.jit(jax.vmap(centre_weights))(graphs))
    assert weights.dtype == np.float32
    first = 0
    for city in (_STAR, _PAIR):
        for region in range(city.num_nodes):
            nodes, _ = _unpadded(_row(graphs, first + region))
            entering = city.adjacency()[[node - first for node in nodes], region]
            expected = np.zeros(weights.shape[1])
            expected[: len(nodes)] = entering / entering.sum() if entering.sum() else 0.0
            np.testing.assert_allclose(weights[first + region], expected, rtol=1e-6)
        first += city.num_nodes


@pytest.mark.parametrize("region", range(7))
def test_diffusion_walks_are_steps_of_jraphs_message_passing_in_both_directions(region):
    graph = _row(region_graphs([_STAR, _PAIR]), region)
    walks = np.asarray(diffusion_walks(graph, 2))
    assert walks.shape == (4, 6, 6) and walks.dtype == np.float32

    def step(x: jax.Array, senders: jax.Array, receivers: jax.Array) -> jax.Array:
        carried = jraph.segment_sum(graph.edges[:, None] * x[senders], receivers, 6)
        total = jraph.segment_sum(graph.edges, receivers, 6)[:, None]
        return jnp.where(total > 0, carried / jnp.where(total > 0, total, 1.0), 0.0)

    expected = []
    for ends in ((graph.senders, graph.receivers), (graph.receivers, graph.senders)):
        once = step(jnp.eye(6), *ends)
        expected += [once, step(once, *ends)]
    np.testing.assert_allclose(walks, np.stack(expected), rtol=1e-5, atol=1e-7)
    shares = walks[[0, 2]].sum(axis=2)
    np.testing.assert_allclose(shares[shares > 0], 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_neighbours": -1}, "`max_neighbours` must be at least 0, got -1"),
        ({"pick": "nearest"}, "`pick` must be one of weight, random, got 'nearest'"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        region_graphs([_PAIR], **options)
