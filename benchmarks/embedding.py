"""Knowledge graph embeddings: triples per second and filtered MRR, on public sets beside PyKEEN and on cities.

    python -m benchmarks.embedding [--quick] [--peer pykeen] [--sets umls,kinships,nations]
    python -m benchmarks.embedding --sets cities [--later hangzhou_metro,nyc_bike_2016] [--seeds 3]

The public sets are the text files that the `pykeen` package ships, so they need it. The peer trains PyKEEN's TuckER
with the same width, epochs, batch, learning rate and kind of loss. Neither stops early, so that both see
the same number of triples; a rate counts every triple once per epoch, though it is asked for both its ends.

The set `cities` is the urban knowledge graph of the cities in the folder that GPDIFF_DATA names, or of simulated ones:
MRR of held-out triples by relation, over the cities trained on and over those folded in later from three visible days,
beside the frequency baseline: a tail is the likelier the more often it is one to the relation in training. `any` ranks
among all entities; `own_kind` only among those of the truth's own kind and city.
"""

import os
import pathlib
import time
from importlib import util
from typing import NamedTuple

import jax
import numpy as np
from absl import flags

from benchmarks.measuring import print_line
from experiments import command_line
from gpdiff_jax.cities import City, SimulationConfig, find_cities, select_channels, simulate_cities
from gpdiff_jax.cities.splits import split_source, split_target
from gpdiff_jax.errors import InputError
from gpdiff_jax.prompts.urban_graph.embedding import (
    Embedding,
    evaluate_embedding,
    fold_in,
    train_embedding,
    translate_triples,
)
from gpdiff_jax.prompts.urban_graph.embedding_training import EmbeddingConfig
from gpdiff_jax.prompts.urban_graph.knowledge_graph import (
    KnowledgeGraph,
    KnowledgeGraphConfig,
    build_knowledge_graph,
    entity_groups,
    join_graphs,
)
from gpdiff_jax.prompts.urban_graph.ranking import rank_by_frequency
from gpdiff_jax.prompts.urban_graph.triples import split_triples

_PUBLIC = ("umls", "kinships", "nations")

flags.DEFINE_bool("quick", False, "one small set and few epochs; ends within two minutes")
flags.DEFINE_enum("peer", None, ["pykeen"], "what to run beside it")
flags.DEFINE_list("sets", ["cities"], f"cities, and public sets among {', '.join(_PUBLIC)}")
flags.DEFINE_list("later", ["hangzhou_metro", "nyc_bike_2016", "melbourne_pedestrians"], "cities to fold in later")
flags.DEFINE_integer("seeds", 1, "seeds, each of another split and another start", 1)
flags.DEFINE_integer("epochs", 100, "training epochs", 1)

_SUPPORT_DAYS = 3
_SHOWN = ("BorderBy", "NearBy", "SimilarFunction", "FlowTo", "BelongsTo")
Parts = tuple[np.ndarray, np.ndarray, np.ndarray]


def _public_set(name: str) -> tuple[KnowledgeGraph, Parts]:
    found = util.find_spec("pykeen")
    if name not in _PUBLIC or found is None or found.origin is None:
        raise InputError(f"set {name!r} is not here; the public sets {', '.join(_PUBLIC)} need the package pykeen")
    folder = pathlib.Path(found.origin).parent / "datasets" / name
    files = [(folder / f"{part}.txt").read_text().splitlines() for part in ("train", "valid", "test")]
    parts = [[tuple(line.split("\t")) for line in lines] for lines in files]
    entities = tuple(sorted({end for part in parts for head, _, tail in part for end in (head, tail)}))
    relations = tuple(sorted({relation for part in parts for _, relation, _ in part}))
    places = [{name: k for k, name in enumerate(names)} for names in (entities, relations, entities)]
    rows = [np.asarray([[place[x] for place, x in zip(places, t, strict=True)] for t in part]) for part in parts]
    train, validation, test = (part.astype(np.int32) for part in rows)
    graph = KnowledgeGraph(
        entities=entities,
        relations=relations,
        triples=np.concatenate([train, validation, test]),
        cities=(),
        city_of_entity=np.full(len(entities), -1, np.int32),
        centroids=np.zeros((0, 24), np.float32),
        config=KnowledgeGraphConfig(),
    )
    return graph, (train, validation, test)


def _public_config() -> EmbeddingConfig:
    """The same for the library and its peer."""
    return EmbeddingConfig(width=64, relation_width=32, epochs=5 if flags.FLAGS.quick else flags.FLAGS.epochs)


def _measure_public(name: str, seed: int) -> None:
    graph, (train, _, test) = _public_set(name)
    config = _public_config()
    seconds = []
    for _ in range(2):  # the second does not compile
        begin = time.perf_counter()
        made = jax.block_until_ready(train_embedding(graph, config, key=jax.random.key(seed), train=train))
        seconds.append(time.perf_counter() - begin)
    rate, ranking = config.epochs * len(train) / seconds[1], evaluate_embedding(made, graph, test, graph.triples)
    case = f"{name}_tucker_{config.width}_{config.epochs}epochs_seed{seed}"
    print_line("embedding", case, "compilation", seconds[0] - seconds[1], "s")
    peer_rate = peer_mrr = {}
    if flags.FLAGS.peer:
        # Here, so that the rest of the benchmark does without it.
        from benchmarks.torch_pykeen import pykeen_run

        theirs_rate, theirs = pykeen_run(name, config, seed)
        peer_rate = {"peer": "pykeen", "peer_value": theirs_rate, "ratio": rate / theirs_rate}
        peer_mrr = {"peer": "pykeen", "peer_value": theirs["mrr"], "ratio": ranking.mrr / theirs["mrr"]}
    print_line("embedding", case, "rate", rate, "triples/s", **peer_rate)
    print_line("embedding", case, "filtered_mrr", ranking.mrr, "1", **peer_mrr)
    for k in (1, 3, 10):
        print_line("embedding", case, f"hits@{k}", ranking.hits(k), "1")


def _cities() -> list[City]:
    folder = os.environ.get("GPDIFF_DATA")
    if not folder:
        return simulate_cities(SimulationConfig(cities=4, regions=48), seed=0)
    names = sorted(path.stem for path in pathlib.Path(folder).glob("*.npz"))
    if flags.FLAGS.quick:
        names = [name for name in names if name.startswith(("hangzhou", "shenzhen", "nyc"))]
    return [select_channels(city, "first")[0] for city in find_cities(folder, names)]


def _measure_cities(seed: int) -> None:
    cities = _cities()
    later = [city for city in cities if city.name in flags.FLAGS.later] or cities[-1:]
    sources = [city for city in cities if city not in later]
    spans = [split_source(city.num_steps, history=12, horizon=6).train for city in sources]
    graph = build_knowledge_graph(sources, spans)
    train, validation, test = split_triples(graph.triples, validation=0.05, test=0.1, key=jax.random.key(seed))
    config = EmbeddingConfig(epochs=5 if flags.FLAGS.quick else flags.FLAGS.epochs)
    begin, key = time.perf_counter(), jax.random.key(100 + seed)
    made = jax.block_until_ready(train_embedding(graph, config, key=key, train=train, validation=validation))
    seconds = time.perf_counter() - begin
    epochs = int(np.isfinite(made.validation_mrr).sum()) * config.evaluate_every
    case = f"sources_tucker_{config.width}_seed{seed}"
    print_line("embedding", case, "rate", epochs * len(train) / seconds, "triples/s")
    _print_relations(case, _ranks(made, graph, test, {"frequency": train}))
    answers: list[_Answers] = []
    for number, city in enumerate(later):
        span = split_target(city.num_steps, city.steps_per_day, _SUPPORT_DAYS, history=12, horizon=6).support
        own = build_knowledge_graph([city], [span], centroids=graph.centroids)
        shown, _, held = split_triples(own.triples, validation=0.0, test=0.2, key=jax.random.key(200 + seed))
        grown = fold_in(made, own, key=jax.random.key(300 + seed + number), train=shown)
        joined = join_graphs(graph, own)
        names = (joined.entities, joined.relations)
        seen, held = (translate_triples(rows, own, *names) for rows in (shown, held))
        everything = np.concatenate([translate_triples(train, graph, *names), seen])
        answers += _ranks(grown, joined, held, {"frequency": everything, "frequency_own_city": seen})
    _print_relations(f"folded_in_tucker_{config.width}_seed{seed}", answers)


class _Answers(NamedTuple):
    """How well the held-out triples of one relation are answered, ours and a baseline's."""

    relation: str
    rivals: str
    baseline: str
    ours: np.ndarray  # reciprocal ranks, from both sides
    theirs: np.ndarray


def _ranks(
    embedding: Embedding, graph: KnowledgeGraph, held: np.ndarray, counts: dict[str, np.ndarray]
) -> list[_Answers]:
    known = np.asarray([relation in embedding.relations for relation in graph.relations])
    held, answers, sizes = held[known[held[:, 1]]], [], (len(graph.entities), len(graph.relations))
    for rivals, groups in (("any", None), ("own_kind", entity_groups(graph))):
        # All relations at once: every other number of triples would be compiled anew.
        ours = evaluate_embedding(embedding, graph, held, graph.triples, groups)
        for baseline, train in counts.items():
            theirs = rank_by_frequency(held, train, graph.triples, *sizes, groups)
            for number, relation in enumerate(graph.relations):
                rows = held[:, 1] == number
                pair = [1.0 / np.concatenate([side[rows] for side in ranking]) for ranking in (ours, theirs)]
                if relation in _SHOWN and rows.any():
                    answers.append(_Answers(relation, rivals, baseline, *pair))
    return answers


def _print_relations(case: str, answers: list[_Answers]) -> None:
    for name in dict.fromkeys(answer[:3] for answer in answers):
        alike = [answer for answer in answers if answer[:3] == name]
        ours = float(np.concatenate([answer.ours for answer in alike]).mean())
        theirs = float(np.concatenate([answer.theirs for answer in alike]).mean())
        relation, rivals, baseline = name
        peer = {"peer": baseline, "peer_value": theirs, "ratio": ours / theirs}
        print_line("embedding", f"{case}_{relation}", f"filtered_mrr_{rivals}", ours, "1", **peer)


def main(argv: list[str]) -> None:
    """Measures every set and seed."""
    del argv
    for seed in range(flags.FLAGS.seeds):
        for name in flags.FLAGS.sets:
            if name == "cities":
                _measure_cities(seed)
            else:
                _measure_public(name, seed)


if __name__ == "__main__":
    command_line.run(main)
