"""In: a parameter zoo. Out: the directions in which parameters of regions differ, by their spread."""

import jax
import numpy as np

from gpdiff_jax.data.sources import city_weights
from gpdiff_jax.errors import check_at_least
from gpdiff_jax.typing import Params
from gpdiff_jax.zoo.parameter_zoo import ParameterZoo


def zoo_directions(zoo: ParameterZoo, count: int) -> Params:
    """The principal directions of own minus pooled parameters, all layers in one vector.

    They are not centred: what all regions have in common against the pooled model is a direction like others. Every
    city weighs the same.

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
    rows = np.zeros((zoo.num_regions, sum(leaf.size for leaf in leaves)))
    for numbers, params in zoo.vectors.parts():
        own = [np.asarray(leaf)[:, 0].reshape(len(numbers), -1) for leaf in jax.tree.leaves(params)]
        rows[numbers] = np.concatenate(own, axis=1)
    rows -= np.concatenate([np.asarray(leaf).ravel() for leaf in leaves])
    weights = city_weights(zoo.city_index)
    rows *= np.sqrt(weights / weights.sum())[:, None]
    # Along a unit vector of the rows' products, their sum is an axis as long as its spread.
    _, mixtures = np.linalg.eigh(rows @ rows.T)
    directions = mixtures[:, ::-1][:, :count].T @ rows
    largest = directions[np.arange(len(directions)), np.abs(directions).argmax(axis=1)]
    directions = (directions * np.where(largest < 0, -1.0, 1.0)[:, None]).astype(np.float32)
    cuts = np.cumsum([leaf.size for leaf in leaves])[:-1]
    parts = np.split(directions, cuts, axis=1)
    return tree.unflatten([part.reshape(-1, *leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])
