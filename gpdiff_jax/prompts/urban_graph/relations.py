"""In: one city, or the readings that may be seen of it. Out: pairs that stand in a relation, one function per relation.

Everything is measured relative to the city itself, so that a pair means the same in a small city and in a large one.
"""

import numpy as np
from jaxtyping import Float, Int

from gpdiff_jax.cities.calendar import slot_of_day
from gpdiff_jax.cities.city import City
from gpdiff_jax.cities.hops import hops_between
from gpdiff_jax.cities.profile import daily_profile
from gpdiff_jax.cities.scaling import region_scales
from gpdiff_jax.cities.splits import Span
from gpdiff_jax.prompts.statistics import kilometres_between

# Degree over the mean degree of the city: where one class ends and the next begins.
DEGREE_BOUNDS = (0.5, 0.8, 1.25, 2.0)
_FEWEST_PAIRS = 24  # steps that two regions must share before a correlation between them counts
_SIGNIFICANCE = 4.0  # standard errors that it must lie above zero; among 80 regions, noise reaches 2.5


def neighbour_pairs(city: City) -> Int[np.ndarray, "X 2"]:
    """BorderBy: regions that an edge joins, in both directions."""
    linked = _linked(city)
    return _pairs(linked)


def near_pairs(city: City, most: int) -> Int[np.ndarray, "X 2"]:
    """NearBy: the nearest regions that are no neighbours, in both directions.

    Near means kilometres where the city has coordinates. Elsewhere it means two hops, the more ways there are between
    two regions the nearer. Neighbours are left out, or the relation would repeat BorderBy.

    Args:
      city: any city.
      most: how many a region names; others may name it on top.

    Returns:
      int32 [X, 2], sorted.
    """
    linked = _linked(city)
    distance = kilometres_between(city)
    if distance is None:
        hops = hops_between(linked)
        ways = linked.astype(np.float64) @ linked
        distance = np.where(hops == 2, 1.0 / (1.0 + ways), np.inf)
    distance = np.where(linked | np.eye(city.num_nodes, dtype=bool), np.inf, distance)
    named = _lowest(distance, most)
    return _pairs(named | named.T)


def flow_pairs(city: City, visible: Span, most: int) -> Int[np.ndarray, "X 2"]:
    """FlowTo: the regions whose next step follows a region most closely.

    A region's deviation from its mean day over the visible span, at one step, is correlated with every other region's
    at the following step; what the whole city does at a step is taken out first, or all would follow all. Counts of
    trips between regions are not part of a city, so dependence in time stands for them.

    Args:
      city: a one-channel city.
      visible: the span that may be seen.
      most: regions that each region leads to; fewer where fewer correlations stand out from noise.

    Returns:
      int32 [X, 2], sorted; a region without enough readings has none.
    """
    readings = city.values[visible.start : visible.stop, :, 0].astype(np.float64)
    mean, std = (scale.astype(np.float64) for scale in region_scales(city, visible))
    scaled = (readings - mean) / std
    slots = slot_of_day(city)[visible.start : visible.stop]
    deviation = scaled - daily_profile(scaled, slots, city.steps_per_day).astype(np.float64).T[slots]
    observed = np.isfinite(deviation)
    known = np.where(observed, deviation, 0.0)
    everyone = known.sum(axis=1) / np.maximum(observed.sum(axis=1), 1)
    known = np.where(observed, known - everyone[:, None], 0.0)
    correlation = _lagged_correlation(known, observed)
    np.fill_diagonal(correlation, -np.inf)
    return _pairs(_lowest(-correlation, most))


def _lagged_correlation(x: Float[np.ndarray, "T N"], observed: np.ndarray) -> Float[np.ndarray, "N N"]:
    """Correlation of x_i(t) and x_j(t + 1) over the steps where both are observed; -inf where noise could be it."""
    before, after = x[:-1], x[1:]
    seen_before, seen_after = observed[:-1].astype(np.float64), observed[1:].astype(np.float64)
    count = seen_before.T @ seen_after
    enough = count >= _FEWEST_PAIRS
    count = np.maximum(count, 1.0)
    mean_before, mean_after = before.T @ seen_after / count, seen_before.T @ after / count
    power_before = np.square(before).T @ seen_after / count - mean_before**2
    power_after = seen_before.T @ np.square(after) / count - mean_after**2
    power = np.sqrt(np.maximum(power_before, 0.0) * np.maximum(power_after, 0.0))
    covariance = before.T @ after / count - mean_before * mean_after
    usable = enough & (power > 1e-9)
    correlation = np.where(usable, covariance / np.where(usable, power, 1.0), 0.0)
    return np.where(correlation > _SIGNIFICANCE / np.sqrt(count), correlation, -np.inf)


def poi_pairs(city: City) -> Int[np.ndarray, "X 2"]:
    """HasPOI: categories that take at least their share of the city's points of interest in a region; none without.

    Returns:
      int32 [X, 2], region and category, sorted.
    """
    if city.poi is None:
        return np.zeros((0, 2), np.int32)
    counts = np.maximum(city.poi.astype(np.float64), 0.0)
    here = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1e-12)
    everywhere = counts.sum(axis=0) / max(counts.sum(), 1e-12)
    return _pairs((counts > 0) & (here >= everywhere[None] * (1 - 1e-9)))


def degree_classes(city: City) -> Int[np.ndarray, " N"]:
    """DegreeClass: 0 to 4, the number of a region's neighbours relative to the city's mean."""
    degree = _linked(city).sum(axis=1)
    return np.searchsorted(DEGREE_BOUNDS, degree / max(degree.mean(), 1e-12)).astype(np.int32)


def district_clusters(city: City, size: int) -> Int[np.ndarray, " N"]:
    """BelongsTo: compact clusters of about `size` regions.

    The first centre is the region nearest to all others, every next one the region farthest from the centres so far
    (Gonzalez, Theoretical Computer Science 38, 1985); a region belongs to its nearest centre. Distance is in km where
    the city has coordinates, else in hops.

    Returns:
      int32 [N], 0 to about N / size - 1.
    """
    distance = kilometres_between(city)
    if distance is None:
        distance = hops_between(_linked(city), apart=float(city.num_nodes))
    centres = [int(np.argmin(distance.sum(axis=1)))]
    for _ in range(max(1, round(city.num_nodes / size)) - 1):
        centres.append(int(np.argmax(distance[:, centres].min(axis=1))))
    return np.argmin(distance[:, centres], axis=1).astype(np.int32)


def _linked(city: City) -> np.ndarray:
    adjacency = city.adjacency()
    return (adjacency > 0) | (adjacency.T > 0)


def _lowest(cost: np.ndarray, most: int) -> np.ndarray:
    """True at the `most` lowest finite entries of every row; of equals, those that come first."""
    order = np.argsort(cost, axis=1, kind="stable")[:, :most]
    chosen = np.zeros(cost.shape, dtype=bool)
    np.put_along_axis(chosen, order, True, axis=1)
    return chosen & np.isfinite(cost)


def _pairs(chosen: np.ndarray) -> np.ndarray:
    return np.argwhere(chosen).astype(np.int32)
