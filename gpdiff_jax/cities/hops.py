"""In: which regions are linked. Out: how many links lie between any two."""

import numpy as np
from jaxtyping import Bool, Float

_MANY_LINKS = 64  # of a region; more take more memory than the hops themselves


def hops_between(linked: Bool[np.ndarray, "N N"], *, apart: float = np.inf) -> Float[np.ndarray, "N N"]:
    """Shortest path lengths by breadth-first search from all regions at once: a hop looks at every link once, or, where
    a region has more than `_MANY_LINKS`, is a matrix product.

    Args:
      linked: [N, N], whether there is a link from a row's region to a column's.
      apart: what stands where no path leads.

    Returns:
      Hops.
    """
    count = len(linked)
    receivers, senders = np.nonzero(linked.T)  # in the order of the receivers
    reached, first = np.unique(receivers, return_index=True)
    dense = linked.T.astype(np.float32) if len(senders) > _MANY_LINKS * count else None
    # Rows are where one gets to; in a row, the regions that one comes from are bits.
    seen = np.packbits(np.eye(count, dtype=bool), axis=1)
    hops, grows = np.zeros((count, count), np.int32), len(reached) > 0
    while grows:
        far = np.unpackbits(~seen, axis=1, count=count)
        hops += far  # one more for whom no path was found yet
        if dense is None:
            met = np.bitwise_or.reduceat(seen[senders], first, axis=0)
        else:
            met = np.packbits(dense[reached] @ (1 - far).astype(np.float32) > 0, axis=1)
        met |= seen[reached]
        grows = bool((met != seen[reached]).any())
        seen[reached] = met
    found = np.unpackbits(seen, axis=1, count=count).astype(bool)
    return np.where(found, hops, apart).T
