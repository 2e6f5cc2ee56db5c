"""In: a city's graph. Out: the ego graph of every region, as one padded, stacked `jraph.GraphsTuple`.

The centre is node 0 of its graph; padding follows jraph's convention (a second graph of spare nodes and edges).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from jaxtyping import Array, Bool, Float

from gpdiff_jax.cities.city import City
from gpdiff_jax.errors import InputError
from gpdiff_jax.typing import RegionGraph

PICKS = ("weight", "random")


def region_graphs(
    cities: Sequence[City], *, max_neighbours: int = 8, pick: str = "weight", seed: int = 0
) -> jraph.GraphsTuple:
    """Cuts the one-hop ego graph of every region of every city.

    Args:
      cities: the cities, in the order of the series bank; their nodes are numbered through.
      max_neighbours: most neighbours that a region keeps; every edge among the kept nodes stays.
      pick: which neighbours a crowded region keeps: "weight" the strongest edges into it, then out of it (ties by
        node number), "random" a draw that depends on `seed` and the region's own id alone.
      seed: for "random".

    Returns:
      A stacked GraphsTuple: nodes int32 [R, N] (number of each node in the bank; spare nodes repeat the centre), edges
      float32 [R, E] (weights; 0 where spare), senders and receivers int32 [R, E] (local numbers), n_node and n_edge
      int32 [R, 2] (real, spare), globals None. N = 2 + the largest number of kept neighbours.

    Raises:
      InputError: `max_neighbours` is negative or `pick` unknown.
    """
    if max_neighbours < 0:
        raise InputError(f"`max_neighbours` must be at least 0, got {max_neighbours}")
    if pick not in PICKS:
        raise InputError(f"`pick` must be one of {', '.join(PICKS)}, got {pick!r}")
    graphs, first = [], 0
    for city in cities:
        adjacency = city.adjacency()
        for region in range(city.num_nodes):
            kept = _neighbours(
                adjacency[:, region], adjacency[region], max_neighbours, pick, seed, city.node_ids[region]
            )
            graphs.append(_ego_graph(city, np.concatenate([[region], kept]), first))
        first += city.num_nodes
    num_nodes = 1 + max(int(g.n_node[0]) for g in graphs)
    num_edges = 1 + max(int(g.n_edge[0]) for g in graphs)
    padded = [jraph.pad_with_graphs(g, num_nodes, num_edges, n_graph=2) for g in graphs]
    stacked: RegionGraph = jax.tree.map(lambda *leaves: np.stack(leaves), *padded)
    spare = np.arange(num_nodes)[None, :] >= stacked.n_node[:, :1]
    stacked = stacked._replace(nodes=np.where(spare, stacked.nodes[:, :1], stacked.nodes))
    return jax.tree.map(jnp.asarray, stacked)


def _neighbours(
    incoming: np.ndarray, outgoing: np.ndarray, most: int, pick: str, seed: int, node_id: str
) -> np.ndarray:
    linked = np.flatnonzero((incoming > 0) | (outgoing > 0))
    if len(linked) <= most:
        return linked
    if pick == "weight":
        return linked[np.lexsort((linked, -outgoing[linked], -incoming[linked]))[:most]]
    draw = np.random.default_rng([seed, *node_id.encode()])
    return np.sort(draw.choice(linked, size=most, replace=False))


def _ego_graph(city: City, kept: np.ndarray, first: int) -> jraph.GraphsTuple:
    local = np.full(city.num_nodes, -1)
    local[kept] = np.arange(len(kept))
    inside = (local[city.senders] >= 0) & (local[city.receivers] >= 0)
    fields: dict[str, Any] = dict(
        nodes=(first + kept).astype(np.int32),
        edges=city.weights[inside].astype(np.float32),
        senders=local[city.senders[inside]].astype(np.int32),
        receivers=local[city.receivers[inside]].astype(np.int32),
        n_node=np.asarray([len(kept)], np.int32),
        n_edge=np.asarray([int(inside.sum())], np.int32),
        globals=None,
    )
    return jraph.GraphsTuple(**fields)


def node_mask(graph: RegionGraph) -> Bool[Array, " N"]:
    """True for the real nodes of one padded region graph."""
    return jnp.arange(graph.nodes.shape[0]) < graph.n_node[0]


def edge_mask(graph: RegionGraph) -> Bool[Array, " E"]:
    """True for the real edges of one padded region graph."""
    return jnp.arange(graph.senders.shape[0]) < graph.n_edge[0]


def centre_weights(graph: RegionGraph) -> Float[Array, " N"]:
    """Share of each node in what flows into the centre: D^-1 A of the centre's row, 0 for itself and for spare nodes.

    Args:
      graph: one padded region graph.

    Returns:
      float32 [N], non-negative, summing to 1, or all 0 where no edge enters the centre.
    """
    into_centre = edge_mask(graph) & (graph.receivers == 0)
    weights = jax.ops.segment_sum(
        jnp.where(into_centre, graph.edges, 0.0), graph.senders, num_segments=graph.nodes.shape[0]
    )
    total = weights.sum()
    return weights / jnp.where(total > 0, total, 1.0)
