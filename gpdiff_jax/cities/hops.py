"""In: which regions are linked. Out: how many links lie between any two."""

import numpy as np
from jaxtyping import Bool, Float


def hops_between(linked: Bool[np.ndarray, "N N"], *, apart: float = np.inf) -> Float[np.ndarray, "N N"]:
    """Shortest path lengths by breadth-first search over all regions at once, one matrix product per hop.

    Args:
      linked: [N, N], whether there is a link from a row's region to a column's.
      apart: what stands where no path leads.

    Returns:
      Hops.
    """
    count = len(linked)
    hops = np.where(np.eye(count, dtype=bool), 0.0, np.inf)
    frontier, distance = np.eye(count, dtype=bool), 0
    while frontier.any():
        distance += 1
        frontier = (frontier.astype(np.float32) @ linked.astype(np.float32) > 0) & np.isinf(hops)
        hops[frontier] = distance
    return np.where(np.isinf(hops), apart, hops)
