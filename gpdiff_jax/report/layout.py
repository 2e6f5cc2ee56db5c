"""In: the coordinates or the edges of a city's graph.
Out: positions on a plane to draw it at.
"""

import numpy as np
from jaxtyping import Float, Int

from gpdiff_jax.cities.hops import hops_between
from gpdiff_jax.errors import InputError

_STRESS_STEPS = 60
_LARGEST = 1500


def project_coordinates(coordinates: Float[np.ndarray, "R 2"]) -> Float[np.ndarray, "R 2"]:
    """Returns longitude and latitude (degrees) as plane positions whose distances are true near the city's middle."""
    middle = np.deg2rad(np.nanmean(coordinates[:, 1])) if len(coordinates) else 0.0
    return coordinates * np.array([np.cos(middle), 1.0])


def graph_layout(edges: Int[np.ndarray, "edges 2"], regions: int) -> Float[np.ndarray, "R 2"]:
    """Lays out a graph so that distances on the plane resemble hop distances in the graph.

    Each connected part starts from classical scaling, the two leading eigenvectors of its double-centred squared hop
    distances (Torgerson, 1952), and is relaxed by a few steps of stress majorisation (Gansner, Koren and North, "Graph
    Drawing by Stress Majorization", 2004). Parts are set side by side, the largest first.

    Args:
      edges: pairs of regions, in any direction.
      regions: how many there are.

    Returns:
      Positions in hops; the same for the same edges.

    Raises:
      InputError: an edge names a region that is not there.
    """
    if len(edges) and (edges.min() < 0 or edges.max() >= regions):
        raise InputError(f"`edges` name regions from {edges.min()} to {edges.max()}, but there are {regions} of them")
    linked = np.zeros((regions, regions), bool)
    linked[edges[:, 0], edges[:, 1]] = linked[edges[:, 1], edges[:, 0]] = True
    hops = hops_between(linked)
    positions = np.zeros((regions, 2))
    parts: dict[int, list[int]] = {}
    for region in range(regions):
        parts.setdefault(int(np.argmax(np.isfinite(hops[region]))), []).append(region)
    placed = []
    for part in sorted(parts.values(), key=len, reverse=True):
        local = _lay_out_part(hops[np.ix_(part, part)])
        positions[part] = local - local.min(axis=0)
        placed.append((part, np.ptp(local, axis=0) + 1.0))
    # Shelves from top to bottom, as wide as the largest part or as a square of everything.
    width = max([np.sqrt(1.4 * sum(float(size.prod()) for _, size in placed)), *(float(size[0]) for _, size in placed)])
    left, top, shelf = 0.0, 0.0, 0.0
    for part, size in placed:
        if left > 0 and left + size[0] > width + 1e-9:
            left, top, shelf = 0.0, top - shelf, 0.0
        positions[part] += np.array([left, top - size[1]])
        left, shelf = left + float(size[0]), max(shelf, float(size[1]))
    return positions


def _lay_out_part(hops: np.ndarray) -> np.ndarray:
    count = len(hops)
    if count <= 2:
        return np.stack([np.arange(count, dtype=np.float64), np.zeros(count)], axis=1)
    squared = hops**2
    centred = -0.5 * (squared - squared.mean(axis=0) - squared.mean(axis=1, keepdims=True) + squared.mean())
    values, vectors = np.linalg.eigh(centred)
    leading = vectors[:, ::-1][:, :2]
    # An eigenvector's sign is arbitrary: fix it, or the map could flip between machines.
    leading = leading * np.sign(leading[np.abs(leading).argmax(axis=0), np.arange(2)])
    positions = leading * np.sqrt(np.maximum(values[::-1][:2], 0.0))
    # Regions with equal hop distances would coincide for ever; a tiny ordered offset lets them part.
    turn = 2.4 * np.arange(count)
    positions = positions + 0.01 * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    weights = 1.0 / np.maximum(squared, 1.0)
    np.fill_diagonal(weights, 0.0)
    laplacian = np.diag(weights.sum(axis=1)) - weights
    solve = np.linalg.pinv(laplacian, hermitian=True) if count <= _LARGEST else None
    for _ in range(_STRESS_STEPS if solve is not None else 0):
        difference = positions[:, None, :] - positions[None, :, :]
        distance = np.maximum(np.sqrt((difference**2).sum(axis=-1)), 1e-9)
        pull = weights * hops / distance
        positions = solve @ (pull.sum(axis=1, keepdims=True) * positions - pull @ positions)
    return positions
