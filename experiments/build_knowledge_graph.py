"""Builds the urban knowledge graph of cities and writes its triples as TSV: head, relation, tail.

Prints a summary by relation. Of a city's readings only the training span of a source (the first 80 %) is used.

    python -m experiments.build_knowledge_graph --data_dir DIR --cities a,b --out_file graph.tsv
    python -m experiments.build_knowledge_graph --out_file graph.tsv      (simulated cities)

A file of triples of your own, --own_triples, is checked and joined in. It names regions as region:CITY/NODE, and may
name concepts of its own, concept:ANYTHING, that all cities share.
"""

import pathlib

from absl import flags

from experiments import command_line
from gpdiff_jax.cities import City, SimulationConfig, find_cities, resample, select_channels, simulate_cities
from gpdiff_jax.cities.splits import split_source
from gpdiff_jax.errors import InputError
from gpdiff_jax.prompts.urban_graph.knowledge_graph import (
    RELATIONS,
    KnowledgeGraph,
    KnowledgeGraphConfig,
    add_triples,
    build_knowledge_graph,
)
from gpdiff_jax.prompts.urban_graph.triples import read_triples, write_triples

_DATA_DIR = flags.DEFINE_string("data_dir", None, "folder with one NAME.npz per city; without it, cities are simulated")
_CITIES = flags.DEFINE_list("cities", None, "names of the cities, separated by commas; needs --data_dir")
_OUT_FILE = flags.DEFINE_string("out_file", "knowledge_graph.tsv", "file to write the triples to")
_OWN_TRIPLES = flags.DEFINE_string("own_triples", None, "TSV file of triples of your own, to be joined in")
_OWN_RELATIONS = flags.DEFINE_list("own_relations", [], "relations that only your own triples have")
_RELATIONS = flags.DEFINE_list("relations", list(RELATIONS), "which relations to build")
_INTERVAL = flags.DEFINE_integer(
    "interval_minutes", None, "common interval that every city is resampled to; each its own if not given", 1, 1440
)
_CHANNELS = flags.DEFINE_string("channels", "first", "first, or the name of a channel")
_SEED = flags.DEFINE_integer("seed", 0, "seed of the simulated cities", 0, 2**31 - 1)

_DEFAULTS = KnowledgeGraphConfig()
_NEAR = flags.DEFINE_integer("near_neighbours", _DEFAULTS.near_neighbours, "regions that NearBy names for each", 1)
_CLASSES = flags.DEFINE_integer("function_classes", _DEFAULTS.function_classes, "activity classes of all cities", 1)
_PER_REGION = flags.DEFINE_integer("classes_per_region", _DEFAULTS.classes_per_region, "classes of a region", 1)
_FLOW = flags.DEFINE_integer("flow_neighbours", _DEFAULTS.flow_neighbours, "regions that FlowTo names for each", 1)
_DISTRICT = flags.DEFINE_integer("district_size", _DEFAULTS.district_size, "regions of a district, about", 1)


def _cities() -> list[City]:
    if _DATA_DIR.value is not None and _CITIES.value is not None:
        found = [select_channels(city, _CHANNELS.value) for city in find_cities(_DATA_DIR.value, _CITIES.value)]
        cities = [city for channels in found for city in channels]
    elif _DATA_DIR.value is None and _CITIES.value is None:
        cities = simulate_cities(SimulationConfig(), seed=_SEED.value)
    else:
        raise InputError("`data_dir` and `cities` come together; give both, or neither for simulated cities")
    return cities if _INTERVAL.value is None else [resample(city, _INTERVAL.value) for city in cities]


def _summary(graph: KnowledgeGraph) -> str:
    rows = graph.summary()
    lines = [f"{'relation':<18}" + "".join(f"{name:>10}" for name in list(rows[0])[1:])]
    lines += [f"{row['relation']:<18}" + "".join(f"{row[name]:>10}" for name in list(row)[1:]) for row in rows]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Builds the graph, writes it and prints what it holds."""
    del argv
    config = KnowledgeGraphConfig(
        relations=tuple(_RELATIONS.value),
        near_neighbours=_NEAR.value,
        function_classes=_CLASSES.value,
        classes_per_region=_PER_REGION.value,
        flow_neighbours=_FLOW.value,
        district_size=_DISTRICT.value,
    )
    cities = _cities()
    # A graph needs no windows: one step of history and one of horizon are the least that a split asks for.
    spans = [split_source(city.num_steps, history=1, horizon=1, name=city.name).train for city in cities]
    graph = build_knowledge_graph(cities, spans, config)
    if _OWN_TRIPLES.value is not None:
        allowed = [*RELATIONS, *_OWN_RELATIONS.value]
        graph = add_triples(graph, read_triples(_OWN_TRIPLES.value, graph, allowed))
    if not len(graph.triples):
        raise InputError(f"the cities have no triple of {', '.join(config.relations)}; choose more relations")
    write_triples(pathlib.Path(_OUT_FILE.value), graph)
    print(_summary(graph))
    print(f"{_OUT_FILE.value}: {len(graph.triples)} triples of {len(graph.entities)} entities in {len(cities)} cities")


if __name__ == "__main__":
    command_line.run(main)
