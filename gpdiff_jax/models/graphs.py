"""In: one padded region graph. Out: what a model computes on it: masks, weights around the centre, random walks."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gpdiff_jax.typing import RegionGraph


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
