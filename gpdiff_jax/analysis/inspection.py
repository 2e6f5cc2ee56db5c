"""In: the prompts of source cities and of a target. Out: what a picture of them shows: places, classes, neighbours.

Of every city only the spans that its prompts were made from are read.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from gpdiff_jax.analysis.measures import join_parts, recall_at
from gpdiff_jax.analysis.prediction import ALL_PARTS, parts_of_prompts
from gpdiff_jax.cities.city import City
from gpdiff_jax.cities.splits import Span
from gpdiff_jax.data.sources import city_weights
from gpdiff_jax.errors import check_at_least, named
from gpdiff_jax.prompts.encoders import PromptEncoder, columns_of_parts, plain_encoder
from gpdiff_jax.prompts.prompt import Prompts, fit_prompt_scaler, region_prompts, scale_prompts
from gpdiff_jax.prompts.statistics import temporal_statistics
from gpdiff_jax.prompts.urban_graph.activity import fit_centroids, nearest_classes, relative_days
from gpdiff_jax.vectors import evenly, principal_axes

RANKS = (1, 5)


@dataclasses.dataclass(frozen=True)
class InspectionConfig:
    """How many function classes, target regions with neighbours, neighbours of each, and pairs of windows."""

    classes: int = 6
    regions: int = 6
    neighbours: int = 3
    pairs: int = 6

    def __post_init__(self) -> None:
        check_at_least(1, named(self))


@dataclasses.dataclass(frozen=True, eq=False)
class SeenCity:
    """A city, the nodes of it that have a prompt, and the V spans that their prompts were made from."""

    city: City
    nodes: Int[np.ndarray, " R"]
    spans: tuple[Span, ...]
    prompts: Prompts  # [V, R, E]


@dataclasses.dataclass(frozen=True, eq=False)
class Projection:
    """Places on a plane, the two directions in which the source regions' scaled prompts differ most."""

    places: Float[np.ndarray, "R 2"]
    variance: tuple[float, float]  # share of the sources' variance along each


@dataclasses.dataclass(frozen=True)
class Recall:
    """How often the nearest prompts in another window of the same city hold the region itself."""

    city: str
    part: str
    days: float  # length of every window
    pairs: int  # of windows without a common step
    found: Mapping[int, float]  # by rank


@dataclasses.dataclass(frozen=True, eq=False)
class Inspection:
    """All R regions, the sources' first, and what their prompts say."""

    names: tuple[str, ...]  # "city/node"
    cities: tuple[str, ...]  # the city of every region
    num_sources: int  # how many regions are sources'; the others are the target's
    labels: tuple[int, ...]  # function class of every region
    class_names: tuple[str, ...]
    projections: Mapping[str, Projection]  # by part
    days: Float[np.ndarray, "R 24"]  # mean days, in standard deviations of the span
    neighbours: Mapping[int, tuple[tuple[int, float], ...]]  # of some target regions: source regions and distances
    recall: tuple[Recall, ...]


def inspect_cities(
    sources: Sequence[SeenCity],
    targets: Sequence[SeenCity],
    encoder: PromptEncoder | None = None,
    config: InspectionConfig = InspectionConfig(),
) -> Inspection:
    """Puts the regions of all cities side by side by their prompts, the first window of every source.

    Args:
      sources: the source cities.
      targets: the channels of the target, each with its support days as the only span.
      encoder: what made the prompts; None for statistics alone.
      config: how much to show.

    Returns:
      Projections are fitted on the source regions, every city with the same weight. Distances are between whole scaled
      prompts. The target regions with neighbours are spread over the projection of the whole prompt.

    Raises:
      InputError: see `region_prompts`.
    """
    shown = [*sources, *targets]
    names = tuple(f"{seen.city.name}/{seen.city.node_ids[node]}" for seen in shown for node in seen.nodes)
    index = np.repeat(np.arange(len(shown)), [len(seen.nodes) for seen in shown])
    count = int((index < len(sources)).sum())
    scaled = _scaled(sources, targets)
    parts = parts_of_prompts(sources[0].prompts.names)
    weights = city_weights(index[:count])
    projections = {part: _project(scaled[:, columns], count, weights) for part, columns in parts.items()}
    labels, class_names = function_classes(shown, config.classes)
    whole = projections[list(parts)[-1]].places
    chosen = count + spread_points(whole[count:], config.regions)
    return Inspection(
        names=names,
        cities=tuple(shown[k].city.name for k in index),
        num_sources=count,
        labels=tuple(labels.tolist()),
        class_names=class_names,
        projections=projections,
        days=np.concatenate([_mean_days(seen) for seen in shown]),
        neighbours={int(row): _nearest(scaled[:count], scaled[row], config.neighbours) for row in chosen},
        recall=_recall(sources, targets, encoder or plain_encoder(), parts, config.pairs),
    )


def function_classes(seen: Sequence[SeenCity], classes: int) -> tuple[Int[np.ndarray, " R"], tuple[str, ...]]:
    """What the regions do in the course of a day, within their city, in classes shared by all cities.

    Args:
      seen: the cities; of each the first span is looked at.
      classes: most classes.

    Returns:
      The class of every region, and a name for each class: the hour at which it is most above its city.
    """
    days = np.concatenate([relative_days(one.city, one.spans[0])[one.nodes] for one in seen])
    index = np.repeat(np.arange(len(seen)), [len(one.nodes) for one in seen])
    centroids = fit_centroids(days, city_weights(index), classes)
    names = tuple(f"class {k + 1}, peak {int(day.argmax()):02d} h" for k, day in enumerate(centroids))
    return nearest_classes(days, centroids, 1)[:, 0], names


def spread_points(places: Float[np.ndarray, "R 2"], count: int) -> Int[np.ndarray, " X"]:
    """At most so many points, the first near the middle, each of the others the farthest from those before it."""
    chosen = [int(np.square(places - places.mean(axis=0)).sum(axis=1).argmin())]
    gap = np.square(places - places[chosen[0]]).sum(axis=1)
    while len(chosen) < count and gap.max() > 0:
        chosen.append(int(gap.argmax()))
        gap = np.minimum(gap, np.square(places - places[chosen[-1]]).sum(axis=1))
    return np.asarray(chosen)


def disjoint_pairs(spans: Sequence[Span], most: int) -> list[tuple[int, int]]:
    """Pairs of numbers of spans without a common step, evenly chosen from all that there are."""
    numbers = range(len(spans))
    pairs = [(a, b) for a in numbers for b in numbers if a != b and spans[a].stop <= spans[b].start]
    return [pairs[k] for k in evenly(len(pairs), most)]


def _scaled(sources: Sequence[SeenCity], targets: Sequence[SeenCity]) -> Float[np.ndarray, "R E"]:
    """First variants of all regions in the scale of the sources, which is made from all their variants."""
    values = jnp.concatenate([seen.prompts.values for seen in sources], axis=1)
    ids = jnp.concatenate([seen.prompts.region_ids for seen in sources])
    index = np.repeat(np.arange(len(sources)), [len(seen.nodes) for seen in sources])
    scaler = fit_prompt_scaler(Prompts(values, ids, sources[0].prompts.names), index)
    return np.concatenate([np.asarray(scale_prompts(seen.prompts, scaler))[0] for seen in [*sources, *targets]])


def _project(scaled: np.ndarray, count: int, weights: Float[np.ndarray, " S"]) -> Projection:
    """All rows along the principal axes of the first `count`."""
    found = principal_axes(scaled[:count], weights)
    return Projection(found.project(scaled), (float(found.shares[0]), float(found.shares[1])))


def _mean_days(seen: SeenCity) -> Float[np.ndarray, "R 24"]:
    table, names = temporal_statistics(seen.city, seen.spans[0])
    return table[seen.nodes][:, [k for k, name in enumerate(names) if name.startswith("profile_")]]


def _nearest(scaled: np.ndarray, prompt: np.ndarray, count: int) -> tuple[tuple[int, float], ...]:
    distance = np.linalg.norm(scaled.astype(np.float64) - prompt, axis=1)
    return tuple((int(row), float(distance[row])) for row in np.argsort(distance, kind="stable")[:count])


def _recall(
    sources: Sequence[SeenCity],
    targets: Sequence[SeenCity],
    encoder: PromptEncoder,
    parts: Mapping[str, np.ndarray],
    most: int,
) -> tuple[Recall, ...]:
    """Sources by the windows of their prompts; a target by the two halves of its support days, cut to whole days."""
    seen = list(sources)
    for target in targets:
        support, day = target.spans[0], target.city.steps_per_day
        half = len(support) // (2 * day) * day
        if half:
            halves = (Span(support.stop - 2 * half, support.stop - half), Span(support.stop - half, support.stop))
            prompts = region_prompts(target.city, halves, encoder)
            seen.append(SeenCity(target.city, target.nodes, halves, prompts))
    columns = columns_of_parts(sources[0].prompts.names)
    found = []
    for one in seen:
        values, pairs = np.asarray(one.prompts.values), disjoint_pairs(one.spans, most)
        if not pairs:
            continue
        days = len(one.spans[0]) / one.city.steps_per_day
        for part in parts:
            chosen = list(columns.values()) if part == ALL_PARTS else [columns[part]]
            joined = [join_parts([table[:, some] for some in chosen]) for table in values]
            rates = [recall_at(joined[first], joined[second], RANKS) for first, second in pairs]
            mean = {rank: float(np.mean([rate[rank] for rate in rates])) for rank in RANKS}
            found.append(Recall(one.city.name, part, days, len(pairs), mean))
    return tuple(found)
