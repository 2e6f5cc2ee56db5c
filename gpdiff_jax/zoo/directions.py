"""In: a parameter zoo. Out: the directions in which parameters of regions differ, by their spread."""

import jax
import numpy as np
from jaxtyping import Int

from gpdiff_jax.data.sources import city_weights
from gpdiff_jax.errors import check_at_least
from gpdiff_jax.typing import Params
from gpdiff_jax.vectors import evenly
from gpdiff_jax.zoo.parameter_zoo import ParameterZoo

_MOST_REGIONS = 2048  # of which directions are made: their products are a matrix


def zoo_directions(zoo: ParameterZoo, count: int) -> Params:
    """The principal directions of own minus pooled parameters, all layers in one vector.

    They are not centred: what all regions have in common against the pooled model is a direction like others. Every
    city weighs the same. Of zoos of more than 2048 regions so many are looked at, of every city as many as of the
    others where it has them, evenly spaced.

    Args:
      zoo: the best vector of every region is looked at.
      count: n, how many directions; fewer where the zoo has fewer regions.

    Returns:
      Leaves float32 [n, ...], the leading direction first; each as long as the root mean square of the differences
      along it, so that a coordinate of 1 is a usual one.

    Raises:
      InputError: `count` is below 1.
    """
    check_at_least(1, {"count": count})
    leaves, tree = jax.tree.flatten(zoo.pooled)
    chosen = _chosen(zoo.city_index, _MOST_REGIONS)
    place = np.full(zoo.num_regions, -1)
    place[chosen] = np.arange(len(chosen))
    rows = np.zeros((len(chosen), sum(leaf.size for leaf in leaves)))
    for numbers, params in zoo.vectors.parts():
        here = np.flatnonzero(place[numbers] >= 0)
        if len(here):
            own = [np.asarray(leaf)[here, 0].reshape(len(here), -1) for leaf in jax.tree.leaves(params)]
            rows[place[numbers[here]]] = np.concatenate(own, axis=1)
    rows -= np.concatenate([np.asarray(leaf).ravel() for leaf in leaves])
    weights = city_weights(zoo.city_index[chosen])
    rows *= np.sqrt(weights / weights.sum())[:, None]
    # Along a unit vector of the rows' products, their sum is an axis as long as its spread.
    _, mixtures = np.linalg.eigh(rows @ rows.T)
    directions = mixtures[:, ::-1][:, :count].T @ rows
    largest = directions[np.arange(len(directions)), np.abs(directions).argmax(axis=1)]
    directions = (directions * np.where(largest < 0, -1.0, 1.0)[:, None]).astype(np.float32)
    cuts = np.cumsum([leaf.size for leaf in leaves])[:-1]
    parts = np.split(directions, cuts, axis=1)
    return tree.unflatten([part.reshape(-1, *leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])


def _chosen(city_index: Int[np.ndarray, " R"], most: int) -> Int[np.ndarray, " X"]:
    """Numbers of at most so many regions, in order, as many of every city as it has of those; one of each at least."""
    sizes = np.bincount(city_index)
    each = int(sizes.max())
    while np.minimum(sizes, each).sum() > most and each > 1:
        each -= 1
    parts = [np.flatnonzero(city_index == city) for city in np.flatnonzero(sizes)]
    return np.sort(np.concatenate([rows[evenly(len(rows), each)] for rows in parts]))
