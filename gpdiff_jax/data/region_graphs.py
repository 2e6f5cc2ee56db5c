"""In: a city's graph. Out: the ego graph of every region, as one padded, stacked `jraph.GraphsTuple`.

The centre is node 0 of its graph; padding follows jraph's convention (a second graph of spare nodes and edges).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jraph
import numpy as np
from jaxtyping import Int

from gpdiff_jax.cities.city import City
from gpdiff_jax.errors import InputError, check_at_least
from gpdiff_jax.typing import RegionGraph

PICKS = ("weight", "random")


def region_graphs(
    cities: Sequence[City],
    *,
    max_neighbours: int = 8,
    pick: str = "weight",
    seed: int = 0,
    rows: Int[np.ndarray, " R"] | None = None,
) -> jraph.GraphsTuple:
    """Cuts the one-hop ego graph of every region of every city.

    Args:
      cities: the cities, in the order of the series bank; their nodes are numbered through.
      max_neighbours: most neighbours that a region keeps; every edge among the kept nodes stays.
      pick: which neighbours a crowded region keeps: "weight" the strongest edges into it, then out of it (ties by
        node number), "random" a draw that depends on `seed` and the region's own id alone.
      seed: for "random".
      rows: the nodes whose graphs are wanted; None for all. Padding is the same for either.

    Returns:
      A stacked GraphsTuple: nodes int32 [R, N] (number of each node in the bank; spare nodes repeat the centre), edges
      float32 [R, E] (weights; 0 where spare), senders and receivers int32 [R, E] (local numbers), n_node and n_edge
      int32 [R, 2] (real, spare), globals None. N = 2 + the largest number of kept neighbours.

    Raises:
      InputError: `max_neighbours` is negative or `pick` unknown.
    """
    check_at_least(0, {"max_neighbours": max_neighbours})
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
    return jax.device_put(stacked if rows is None else jax.tree.map(lambda leaf: leaf[rows], stacked))


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


def trim_graphs(graphs: RegionGraph, num_nodes: int, num_edges: int) -> RegionGraph:
    """Stacked region graphs with less padding.

    Args:
      graphs: of `region_graphs`, or some of its rows.
      num_nodes: N to keep; at least one more than the largest graph has.
      num_edges: E to keep; at least one more than the largest graph has.

    Returns:
      The graphs with nodes [R, N] and edges [R, E]; real nodes and edges are as they were.
    """
    return graphs._replace(
        nodes=graphs.nodes[:, :num_nodes],
        edges=graphs.edges[:, :num_edges],
        senders=graphs.senders[:, :num_edges],
        receivers=graphs.receivers[:, :num_edges],
        n_node=np.stack([graphs.n_node[:, 0], num_nodes - graphs.n_node[:, 0]], axis=1),
        n_edge=np.stack([graphs.n_edge[:, 0], num_edges - graphs.n_edge[:, 0]], axis=1),
    )
