"""In: a city's graph. Out: the ego graph of every region, as one padded, stacked `jraph.GraphsTuple`.

The centre is node 0 of its graph; padding follows jraph's convention (a second graph of spare nodes and edges).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gpdiff_jax.cities.city import City
from gpdiff_jax.errors import InputError
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


def node_mask(graph: RegionGraph) -> Bool[Array, " N"]:
    """True for the real nodes of one padded region graph."""
    return jnp.arange(graph.nodes.shape[0], dtype=graph.n_node.dtype) < graph.n_node[0]


def edge_mask(graph: RegionGraph) -> Bool[Array, " E"]:
    """True for the real edges of one padded region graph."""
    return jnp.arange(graph.senders.shape[0], dtype=graph.n_edge.dtype) < graph.n_edge[0]


def _one_hot(graph: RegionGraph, ends: Int[Array, " E"]) -> Float[Array, "E N"]:
    # A product with these is a sum over edges: on a CPU a scatter is a loop, one edge after another.
    numbers = jnp.arange(graph.nodes.shape[0], dtype=ends.dtype)
    return (ends[:, None] == numbers[None, :]).astype(graph.edges.dtype)


def centre_weights(graph: RegionGraph) -> Float[Array, " N"]:
    """Share of each node in what flows into the centre: D^-1 A of the centre's row, 0 for itself and for spare nodes.

    Args:
      graph: one padded region graph.

    Returns:
      float32 [N], non-negative, summing to 1, or all 0 where no edge enters the centre.
    """
    into_centre = jnp.where(edge_mask(graph) & (graph.receivers == 0), graph.edges, 0.0)
    weights = into_centre @ _one_hot(graph, graph.senders)
    total = weights.sum()
    return weights / jnp.where(total > 0, total, 1.0)


def transition_matrices(graph: RegionGraph) -> tuple[Float[Array, "N N"], Float[Array, "N N"]]:
    """Random walks on one padded region graph, along its edges and against them (Li et al., arXiv 1707.01926, eq. 2).

    Args:
      graph: one padded region graph.

    Returns:
      Two float32 [N, N] matrices. Row i of the first holds the share of each node in what flows into i, row i of the
      second its share in what flows out of i. A row sums to 1, or is 0 where there is no such edge or the node is
      spare.
    """
    weights = jnp.where(edge_mask(graph), graph.edges, 0.0)
    into = (_one_hot(graph, graph.receivers) * weights[:, None]).T @ _one_hot(graph, graph.senders)
    walks = []
    for adjacency in (into, into.T):
        total = adjacency.sum(axis=1, keepdims=True)
        walks.append(adjacency / jnp.where(total > 0, total, 1.0))
    return walks[0], walks[1]


def diffusion_walks(graph: RegionGraph, order: int) -> Float[Array, "S N N"]:
    """1 to `order` steps of the random walk along the edges, then against them: S = 2 x order matrices.

    The supports of a diffusion convolution (Li et al., arXiv 1707.01926, eq. 2).
    """
    walks = []
    for step in transition_matrices(graph):
        walk = step
        for _ in range(order):
            walks.append(walk)
            walk = step @ walk
    return jnp.stack(walks)


def walks_beside_self(graph: RegionGraph, order: int) -> Float[Array, "N S N"]:
    """The identity and the walks of `diffusion_walks` in the layout of `carry_channels`: S = 1 + 2 x order."""
    walks = diffusion_walks(graph, order)
    return jnp.concatenate([jnp.eye(walks.shape[1], dtype=walks.dtype)[None], walks]).transpose(1, 0, 2)
