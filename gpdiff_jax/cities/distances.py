"""In: a matrix of numbers between regions. Out: whether they are distances, which are no weights of a graph."""

import numpy as np
from jaxtyping import Float

_MOST_REGIONS = 100  # that are looked at; triples are many
_SLACK = 1.01
_NEARLY_ALL = 0.99


def is_distance_matrix(matrix: Float[np.ndarray, "N N"]) -> bool:
    """Whether a matrix looks like distances: nearly every pair has one, and no detour is shorter than the way.

    Numbers that say how near regions are (weights, trips) do not obey the triangle inequality.

    Args:
      matrix: [N, N], 0 where there is nothing, and on the diagonal.

    Returns:
      False for fewer than four regions, of which nothing can be said.
    """
    count = len(matrix)
    if count < 4:
        return False
    rows = np.unique(np.linspace(0, count - 1, min(count, _MOST_REGIONS)).round().astype(int))
    part = matrix[np.ix_(rows, rows)].astype(np.float64)
    apart = ~np.eye(len(part), dtype=bool)
    if (part[apart] > 0).mean() < _NEARLY_ALL:
        return False
    detour = (part[:, :, None] + part[None, :, :]).transpose(0, 2, 1)  # from, to, by way of
    triples = apart[:, :, None] & apart[:, None, :] & apart[None, :, :]
    obeys = (part[:, :, None] <= _SLACK * detour)[triples].mean()
    # All alike obey as well, and say nothing.
    return bool(obeys >= _NEARLY_ALL and part[apart].std() > 0.1 * part[apart].mean())
