"""In: cities, and the span of each that may be seen. Out: an urban knowledge graph, triples over regions and concepts.

Regions of different cities never share a triple: concepts (activity classes, categories of points of interest, classes
of degree) are shared by all cities, and over them knowledge travels. Names say what an entity is:

    region:CITY/NODE   city:CITY   district:CITY/K   function:K   poi:CATEGORY   degree:K   concept:ANYTHING (a user's)
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from gpdiff_jax.cities.city import City
from gpdiff_jax.cities.splits import Span
from gpdiff_jax.errors import InputError, check_at_least, named
from gpdiff_jax.prompts.urban_graph.activity import fit_centroids, nearest_classes, relative_days
from gpdiff_jax.prompts.urban_graph.relations import (
    degree_classes,
    district_clusters,
    flow_pairs,
    near_pairs,
    neighbour_pairs,
    poi_pairs,
)

RELATIONS = ("BorderBy", "NearBy", "SimilarFunction", "HasPOI", "FlowTo", "DegreeClass", "BelongsTo")
_FROM_READINGS = ("SimilarFunction", "FlowTo")
Named = tuple[str, str, str]
"""A triple by names: head, relation, tail."""


@dataclasses.dataclass(frozen=True)
class KnowledgeGraphConfig:
    """Which relations a graph has, and how dense they are.

    BorderBy: an edge joins two regions. NearBy: the `near_neighbours` nearest regions that are no neighbours.
    SimilarFunction: a region and the `classes_per_region` nearest of `function_classes` classes of mean days, relative
    to the city's (see `relative_days`). HasPOI: a region and the categories that it has more of than the city. FlowTo:
    the `flow_neighbours` regions whose next step follows a region's deviation from its mean day most closely.
    DegreeClass: a region and its number of neighbours in five classes. BelongsTo: region to district (about
    `district_size` regions), district to city.

    Raises:
      InputError: an unknown relation, none, one twice, or a number below 1.
    """

    relations: tuple[str, ...] = RELATIONS
    near_neighbours: int = 4
    function_classes: int = 64
    classes_per_region: int = 4
    flow_neighbours: int = 4
    district_size: int = 12

    def __post_init__(self) -> None:
        if not self.relations:
            raise InputError(f"`relations` is empty; choose from {', '.join(RELATIONS)}")
        for index, relation in enumerate(self.relations):
            if relation not in RELATIONS:
                raise InputError(f"relation {relation!r} is unknown; choose from {', '.join(RELATIONS)}")
            if relation in self.relations[:index]:
                raise InputError(f"relation {relation!r} is named twice; name each once")
        check_at_least(
            1,
            named(
                self, "near_neighbours", "function_classes", "classes_per_region", "flow_neighbours", "district_size"
            ),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class KnowledgeGraph:
    """Triples over named entities, and what it takes to describe another city in the same words.

    Only relations that have a triple, and entities that are in one, or are a region, have a number.
    """

    entities: tuple[str, ...]
    relations: tuple[str, ...]
    triples: Int[np.ndarray, "X 3"]  # head, relation, tail; sorted, none twice
    cities: tuple[str, ...]
    city_of_entity: Int[np.ndarray, " entities"]  # number of the city; -1 for a concept, which all cities share
    centroids: Float[np.ndarray, "K 24"]  # of the activity classes; no rows without SimilarFunction
    config: KnowledgeGraphConfig

    def regions(self, city: str) -> tuple[str, ...]:
        """Names of the regions of a city, in the city's order."""
        return tuple(name for name in self.entities if name.startswith(f"region:{city}/"))

    def named_triples(self) -> list[Named]:
        """All triples by names, in order."""
        return [(self.entities[h], self.relations[r], self.entities[t]) for h, r, t in self.triples.tolist()]

    def summary(self) -> list[dict[str, str | int]]:
        """Per relation its triples, heads and tails, and how many of the triples run both ways."""
        rows: list[dict[str, str | int]] = []
        for number, relation in enumerate(self.relations):
            pairs = self.triples[self.triples[:, 1] == number][:, [0, 2]]
            known = set(map(tuple, pairs.tolist()))
            mutual = sum((tail, head) in known for head, tail in known)
            heads, tails = (len(np.unique(pairs[:, side])) for side in (0, 1))
            rows.append({"relation": relation, "triples": len(pairs), "heads": heads, "tails": tails, "mutual": mutual})
        return rows


def build_knowledge_graph(
    cities: Sequence[City],
    spans: Sequence[Span],
    config: KnowledgeGraphConfig = KnowledgeGraphConfig(),
    *,
    centroids: Float[np.ndarray, "K 24"] | None = None,
) -> KnowledgeGraph:
    """Builds the triples of cities from their static facts and from what may be seen of their readings.

    Args:
      cities: one-channel cities, each name once.
      spans: per city, what may be seen of its readings; SimilarFunction and FlowTo use it, nothing else does.
      config: relations and their density.
      centroids: float32 [K, 24], the activity classes of an earlier graph, so that a city that comes later is described
        in the same classes; None fits them on these cities, each with the same weight.

    Returns:
      The graph.

    Raises:
      InputError: no city, a name twice, several channels, a span outside of the series or without a reading, or a city
        of several regions without an edge.
    """
    _check(cities, spans, config)
    days = {}
    if "SimilarFunction" in config.relations:
        days = {city.name: relative_days(city, span) for city, span in zip(cities, spans, strict=True)}
        if centroids is None:
            weights = np.concatenate([np.full(len(rows), 1 / len(rows)) for rows in days.values()])
            centroids = fit_centroids(np.concatenate(list(days.values())), weights, config.function_classes)
    shared = np.zeros((0, 24), np.float32) if centroids is None else centroids
    triples: list[Named] = []
    for city, span in zip(cities, spans, strict=True):
        makers = _makers(city, span, config, days.get(city.name), shared)
        triples += [triple for relation in config.relations for triple in makers[relation]()]
    regions = [region_name(city, node) for city in cities for node in city.node_ids]
    return _number(triples, regions, tuple(city.name for city in cities), shared, config)


def add_triples(graph: KnowledgeGraph, triples: Sequence[Named]) -> KnowledgeGraph:
    """The graph with more triples, as `read_triples` returns them; new entities follow those that it has."""
    named = [*graph.named_triples(), *triples]
    return _number(named, graph.entities, graph.cities, graph.centroids, graph.config)


def join_graphs(first: KnowledgeGraph, second: KnowledgeGraph) -> KnowledgeGraph:
    """One graph of the cities of two; the entities of the first keep their numbers, new ones of the second follow.

    Raises:
      InputError: a city is in both.
    """
    twice = [city for city in second.cities if city in first.cities]
    if twice:
        raise InputError(f"city {twice[0]!r} is in both graphs; leave it out of one")
    entities = tuple(dict.fromkeys([*first.entities, *second.entities]))
    triples = [*first.named_triples(), *second.named_triples()]
    return _number(triples, entities, first.cities + second.cities, first.centroids, first.config)


def region_name(city: City, node: str) -> str:
    """The entity of a region."""
    return f"region:{city.name}/{node}"


def entity_groups(graph: KnowledgeGraph) -> Int[np.ndarray, " entities"]:
    """Numbers entities by kind and city: what else could stand in an entity's place in a triple."""
    kinds = [name.partition(":")[0] for name in graph.entities]
    keys = list(zip(kinds, graph.city_of_entity.tolist(), strict=True))
    # Cities are each other's alternatives, though each is a city's own entity.
    keys = [(kind, -1 if kind == "city" else city) for kind, city in keys]
    number = {key: index for index, key in enumerate(dict.fromkeys(keys))}
    return np.asarray([number[key] for key in keys], np.int32)


def _makers(
    city: City, span: Span, config: KnowledgeGraphConfig, days: np.ndarray | None, centroids: np.ndarray
) -> dict[str, Callable[[], list[Named]]]:
    regions = [region_name(city, node) for node in city.node_ids]

    def between(relation: str, pairs: np.ndarray, tails: list[str] = regions) -> list[Named]:
        return [(regions[head], relation, tails[tail]) for head, tail in pairs.tolist()]

    def functions() -> list[Named]:
        assert days is not None
        classes = nearest_classes(days, centroids, config.classes_per_region)
        return [(regions[n], "SimilarFunction", f"function:{k}") for n, row in enumerate(classes.tolist()) for k in row]

    def districts() -> list[Named]:
        clusters = district_clusters(city, config.district_size)
        names = [f"district:{city.name}/{cluster}" for cluster in range(clusters.max() + 1)]
        inside = [(regions[n], "BelongsTo", names[cluster]) for n, cluster in enumerate(clusters.tolist())]
        return inside + [(name, "BelongsTo", f"city:{city.name}") for name in names]

    def degrees() -> list[Named]:
        return [(regions[n], "DegreeClass", f"degree:{k}") for n, k in enumerate(degree_classes(city).tolist())]

    return {
        "BorderBy": lambda: between("BorderBy", neighbour_pairs(city)),
        "NearBy": lambda: between("NearBy", near_pairs(city, config.near_neighbours)),
        "SimilarFunction": functions,
        "HasPOI": lambda: between("HasPOI", poi_pairs(city), [f"poi:{name}" for name in city.poi_names]),
        "FlowTo": lambda: between("FlowTo", flow_pairs(city, span, config.flow_neighbours)),
        "DegreeClass": degrees,
        "BelongsTo": districts,
    }


def _number(
    triples: Sequence[Named],
    first: Sequence[str],
    cities: tuple[str, ...],
    centroids: np.ndarray,
    config: KnowledgeGraphConfig,
) -> KnowledgeGraph:
    """Numbers names, the entities in `first` first; the rest in the order of the triples."""
    used = dict.fromkeys(relation for _, relation, _ in triples)
    relations = tuple(sorted(used, key=lambda name: RELATIONS.index(name) if name in RELATIONS else len(RELATIONS)))
    entities = tuple(dict.fromkeys([*first, *(name for head, _, tail in triples for name in (head, tail))]))
    number = {name: index for index, name in enumerate(entities)}
    rows = {(number[head], relations.index(relation), number[tail]) for head, relation, tail in triples}
    return KnowledgeGraph(
        entities=entities,
        relations=relations,
        triples=np.asarray(sorted(rows, key=lambda row: (row[1], row[0], row[2])), np.int32).reshape(-1, 3),
        cities=cities,
        city_of_entity=np.asarray([_city_number(name, cities) for name in entities], np.int32),
        centroids=centroids,
        config=config,
    )


def _city_number(entity: str, cities: tuple[str, ...]) -> int:
    kind, _, rest = entity.partition(":")
    if kind == "city":
        return cities.index(rest)
    # A city's name holds no slash, a node's may.
    return cities.index(rest.partition("/")[0]) if kind in ("region", "district") else -1


def _check(cities: Sequence[City], spans: Sequence[Span], config: KnowledgeGraphConfig) -> None:
    if not cities:
        raise InputError("`cities` is empty; name at least one city")
    if len(spans) != len(cities):
        raise InputError(f"`spans` (={len(spans)}) must be one per city, of which there are {len(cities)}")
    names = [city.name for city in cities]
    for city, span in zip(cities, spans, strict=True):
        if names.count(city.name) > 1:
            raise InputError(f"city {city.name!r} is named twice; name each city once")
        if "BorderBy" in config.relations and city.num_nodes > 1 and len(city.weights) == 0:
            raise InputError(f"city {city.name!r} has no edge; give it some, or leave the relation BorderBy out")
        if not set(_FROM_READINGS) & set(config.relations):
            continue
        if city.num_channels != 1:
            raise InputError(f"city {city.name!r} has {city.num_channels} channels; select one of {city.feature_names}")
        if not 0 <= span.start < span.stop <= city.num_steps:
            raise InputError(
                f"the span of city {city.name!r} ({span.start} to {span.stop}) must lie in its {city.num_steps} steps"
            )
