"""In: simulated and hand-made cities, and TSV files. Out: triples that mean what they say, and clear errors."""

import dataclasses
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpdiff_jax.cities import City
from gpdiff_jax.cities.splits import Span
from gpdiff_jax.errors import InputError
from gpdiff_jax.prompts.urban_graph.activity import fit_centroids, nearest_classes, relative_days
from gpdiff_jax.prompts.urban_graph.knowledge_graph import (
    RELATIONS,
    KnowledgeGraph,
    KnowledgeGraphConfig,
    add_triples,
    build_knowledge_graph,
    entity_groups,
    join_graphs,
)
from gpdiff_jax.prompts.urban_graph.relations import (
    degree_classes,
    district_clusters,
    flow_pairs,
    near_pairs,
    poi_pairs,
)
from gpdiff_jax.prompts.urban_graph.triples import read_triples, split_triples, write_triples

_ROOT = pathlib.Path(__file__).resolve().parents[3]
_CONFIG = KnowledgeGraphConfig(function_classes=6, classes_per_region=2, district_size=4, near_neighbours=2)
_SPAN = Span(0, 240)


@pytest.fixture(scope="module", name="graph")
def _graph(simulated_cities: list[City]) -> KnowledgeGraph:
    return build_knowledge_graph(simulated_cities[:2], [_SPAN] * 2, _CONFIG)


def _of(graph: KnowledgeGraph, relation: str) -> set[tuple[str, str]]:
    return {(head, tail) for head, name, tail in graph.named_triples() if name == relation}


def _path_city(city: City, edges: list[tuple[int, int]], **fields) -> City:
    senders, receivers = (np.asarray(ends, np.int32) for ends in zip(*edges, strict=True))
    ones = np.ones(len(edges), np.float32)
    return dataclasses.replace(city, senders=senders, receivers=receivers, weights=ones, **fields)


def test_a_graph_numbers_every_region_once_and_cities_share_only_concepts(graph, simulated_cities):
    assert graph.relations == RELATIONS and graph.triples.dtype == np.int32
    for index, city in enumerate(simulated_cities[:2]):
        assert graph.regions(city.name) == tuple(f"region:{city.name}/{node}" for node in city.node_ids)
        assert (graph.city_of_entity[[graph.entities.index(r) for r in graph.regions(city.name)]] == index).all()
    assert len(np.unique(graph.triples, axis=0)) == len(graph.triples)
    ends = graph.city_of_entity[graph.triples[:, [0, 2]]]
    assert ((ends[:, 0] == ends[:, 1]) | (ends[:, 1] == -1)).all()
    concepts = {
        name.partition(":")[0] for name, city in zip(graph.entities, graph.city_of_entity, strict=True) if city < 0
    }
    assert concepts == {"function", "poi", "degree"}


def test_neighbours_are_the_edges_in_both_directions_and_the_near_are_no_neighbours(graph, simulated_cities):
    city = simulated_cities[0]
    name = [f"region:{city.name}/{node}" for node in city.node_ids]
    edges = {(name[a], name[b]) for a, b in zip(city.senders, city.receivers, strict=True)}
    borders = {pair for pair in _of(graph, "BorderBy") if pair[0].startswith(f"region:{city.name}/")}
    assert borders == edges | {(b, a) for a, b in edges}
    near = _of(graph, "NearBy")
    assert not near & _of(graph, "BorderBy") and all((b, a) in near and a != b for a, b in near)


def test_near_means_kilometres_and_without_coordinates_two_hops(simulated_cities):
    city = _path_city(
        simulated_cities[0],
        [(k, k + 1) for k in range(7)],
        latitude=np.arange(8) / 100.0,
        longitude=np.zeros(8),
    )
    two_apart = {(a, b) for a in range(8) for b in range(8) if abs(a - b) == 2}
    ends = {(0, 3), (3, 0), (1, 4), (4, 1), (3, 6), (6, 3), (4, 7), (7, 4)}
    assert set(map(tuple, near_pairs(city, 2).tolist())) == two_apart | ends
    blind = dataclasses.replace(city, latitude=None, longitude=None)
    assert set(map(tuple, near_pairs(blind, 2).tolist())) == two_apart


def test_flow_follows_the_region_that_moves_first(simulated_cities):
    rng, steps = np.random.default_rng(0), 240
    noise = rng.normal(size=(steps, 8))
    moved = noise.copy()
    moved[1:, 3] = 0.8 * noise[:-1, 5] + 0.2 * noise[1:, 3]  # 3 does what 5 did a step before
    city = dataclasses.replace(simulated_cities[0], values=(50 + 5 * moved).astype(np.float32)[:, :, None])
    pairs = set(map(tuple, flow_pairs(city, Span(0, steps), 2).tolist()))
    assert (5, 3) in pairs and (3, 5) not in pairs and len(pairs) <= 2
    city.values[:, 3] = np.nan
    assert all(3 not in pair for pair in flow_pairs(city, Span(0, steps), 2).tolist())


def test_only_the_visible_span_is_seen(graph, simulated_cities):
    hidden = []
    for city in simulated_cities[:2]:
        values = np.array(city.values)
        values[_SPAN.stop :] *= np.float32(3)
        values[_SPAN.stop :: 5] = np.nan
        hidden.append(dataclasses.replace(city, values=values))
    again = build_knowledge_graph(hidden, [_SPAN] * 2, _CONFIG)
    assert again.entities == graph.entities
    np.testing.assert_array_equal(again.triples, graph.triples)
    np.testing.assert_array_equal(again.centroids, graph.centroids)
    other = build_knowledge_graph(simulated_cities[:2], [Span(48, 288)] * 2, _CONFIG)
    assert _of(other, "FlowTo") != _of(graph, "FlowTo") and _of(other, "BorderBy") == _of(graph, "BorderBy")


def test_a_later_city_is_described_by_the_first_cities_classes(graph, simulated_cities):
    city = simulated_cities[2]
    later = build_knowledge_graph([city], [_SPAN], _CONFIG, centroids=graph.centroids)
    days = relative_days(city, _SPAN)
    np.testing.assert_array_equal(later.centroids, graph.centroids)
    expected = set()
    for node, day in zip(city.node_ids, days, strict=True):
        order = sorted(range(len(graph.centroids)), key=lambda k: ((day - graph.centroids[k]) ** 2).sum())
        expected |= {(f"region:{city.name}/{node}", f"function:{k}") for k in order[:2]}
    assert _of(later, "SimilarFunction") == expected
    joined = join_graphs(graph, later)
    assert joined.entities[: len(graph.entities)] == graph.entities
    assert set(joined.named_triples()) == set(graph.named_triples()) | set(later.named_triples())
    with pytest.raises(InputError, match=f"city '{city.name}' is in both graphs"):
        join_graphs(joined, later)


def test_days_are_relative_to_the_city_and_free_of_its_level(simulated_cities):
    city = simulated_cities[0]
    days = relative_days(city, _SPAN)
    assert np.square(days).sum(axis=1).mean() == pytest.approx(1.0, rel=1e-5)
    np.testing.assert_allclose(days.mean(axis=0), 0, atol=1e-5)
    louder = dataclasses.replace(city, values=city.values * np.float32(7))
    np.testing.assert_allclose(relative_days(louder, _SPAN), days, atol=1e-4)


def test_centroids_are_the_means_of_their_days_and_no_more_than_there_are_days():
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(3, 24)) * 5
    days = (centres[np.arange(30) % 3] + 0.1 * rng.normal(size=(30, 24))).astype(np.float32)
    weights = rng.uniform(0.5, 1.5, size=30)
    centroids = fit_centroids(days, weights, 3)
    label = nearest_classes(days, centroids, 1)[:, 0]
    assert len(np.unique(label)) == 3
    for k in range(3):
        np.testing.assert_allclose(
            centroids[k], np.average(days[label == k], axis=0, weights=weights[label == k]), rtol=1e-4, atol=1e-5
        )
    assert len(fit_centroids(np.repeat(days[:2], 5, axis=0), np.ones(10), 8)) == 2


def test_static_classes_by_hand(simulated_cities):
    city = _path_city(
        simulated_cities[0],
        [(0, k) for k in range(1, 8)],
        latitude=None,
        longitude=None,
        poi=np.array([[4, 0], [0, 1], [2, 2], [0, 0], [1, 0], [1, 0], [1, 0], [1, 0]], np.float32),
        poi_names=("food", "school"),
    )
    np.testing.assert_array_equal(degree_classes(city), [4] + [1] * 7)  # 7 and 1 over a mean of 1.75
    # The city has 10 of food and 3 of school, so a half of each is more than the share of school alone.
    assert poi_pairs(city).tolist() == [[0, 0], [1, 1], [2, 1], [4, 0], [5, 0], [6, 0], [7, 0]]
    clusters = district_clusters(city, 4)
    assert clusters.shape == (8,) and set(clusters.tolist()) == {0, 1} and clusters[0] == 0
    assert poi_pairs(dataclasses.replace(city, poi=None, poi_names=())).shape == (0, 2)


def test_relations_can_be_left_out_and_a_lone_region_has_a_graph(simulated_cities):
    only = KnowledgeGraphConfig(relations=("DegreeClass", "BorderBy"))
    graph = build_knowledge_graph(simulated_cities[:1], [Span(0, 0)], only)  # nothing is seen
    assert graph.relations == ("BorderBy", "DegreeClass") and graph.centroids.shape == (0, 24)
    empty = np.zeros(0, np.int32)
    alone = dataclasses.replace(
        simulated_cities[0],
        values=simulated_cities[0].values[:, :1],
        node_ids=("a b",),
        senders=empty,
        receivers=empty,
        weights=np.zeros(0, np.float32),
        latitude=None,
        longitude=None,
        poi=None,
        poi_names=(),
    )
    lone = build_knowledge_graph([alone], [_SPAN], _CONFIG)
    assert lone.relations == ("SimilarFunction", "DegreeClass", "BelongsTo")


def test_triples_round_trip_through_a_file(graph, tmp_path):
    path = tmp_path / "graph.tsv"
    write_triples(path, graph)
    assert read_triples(path, graph) == graph.named_triples()
    again = add_triples(graph, read_triples(path, graph))
    assert again.entities == graph.entities and again.relations == graph.relations
    np.testing.assert_array_equal(again.triples, graph.triples)


@given(names=st.lists(st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1), min_size=1, unique=True))
def test_any_name_survives_the_file(names, graph, tmp_path_factory):
    own = [(graph.entities[0], "Likes", f"concept:{name}") for name in names]
    grown, path = add_triples(graph, own), tmp_path_factory.mktemp("tsv") / "own.tsv"
    write_triples(path, grown)
    assert read_triples(path, graph, [*graph.relations, "Likes"]) == grown.named_triples()
    assert set(own) <= set(grown.named_triples())


def test_own_triples_join_the_graph_with_concepts_of_their_own(graph, tmp_path):
    path, head = tmp_path / "own.tsv", graph.entities[0]
    path.write_bytes(f"\ufeff{head}\tKindOf\tconcept:harbour\r\n\n{head}\tBorderBy\t{graph.entities[3]}\n".encode())
    grown = add_triples(graph, read_triples(path, graph, [*RELATIONS, "KindOf"]))
    assert grown.relations == (*graph.relations, "KindOf")
    assert (head, "KindOf", "concept:harbour") in grown.named_triples()
    assert grown.city_of_entity[grown.entities.index("concept:harbour")] == -1


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{0}\tBorderBy", r"own.tsv, line 2: '.*BorderBy' must be head, relation and tail, parted by tabs"),
        ("{0}\t\t{1}", "must be head, relation and tail"),
        ("{0}\tBorderBy\t{1}\t1.0", "must be head, relation and tail"),
        ("{0}\tbordersOn\t{1}", "line 2: relation 'bordersOn' is unknown; use one of BorderBy, NearBy"),
        ("{0}\tBorderBy\tregion:atlantis/1", "line 2: entity 'region:atlantis/1' exists nowhere; name a region"),
        ("concept:\tBorderBy\t{1}", "entity 'concept:' exists nowhere"),
    ],
)
def test_a_bad_line_is_named(graph, tmp_path, line, expected):
    path = tmp_path / "own.tsv"
    good = f"{graph.entities[0]}\tBorderBy\t{graph.entities[1]}\n"
    path.write_text(good + line.format(*graph.entities) + "\n")
    with pytest.raises(InputError, match=expected) as caught:
        read_triples(path, graph)
    assert "\n" not in str(caught.value)


def test_a_bad_file_is_named(graph, tmp_path):
    with pytest.raises(InputError, match=r"absent.tsv cannot be read \(No such file"):
        read_triples(tmp_path / "absent.tsv", graph)
    (tmp_path / "bytes.tsv").write_bytes(b"region\xff")
    with pytest.raises(InputError, match=r"not UTF-8 text \(byte 6\)"):
        read_triples(tmp_path / "bytes.tsv", graph)
    with pytest.raises(InputError, match="cannot be written"):
        write_triples(tmp_path / "no" / "folder.tsv", graph)


def test_a_bad_city_is_named(simulated_cities):
    city = simulated_cities[0]
    empty = np.zeros(0, np.int32)
    edgeless = dataclasses.replace(city, senders=empty, receivers=empty, weights=np.zeros(0, np.float32))
    silent = np.array(city.values)
    silent[:240] = np.nan
    twice = dataclasses.replace(city, values=np.repeat(city.values, 2, axis=2), feature_names=("a", "b"))
    for cities, spans, expected in (
        ([], [], "`cities` is empty"),
        ([city], [], r"`spans` \(=0\) must be one per city"),
        ([city, city], [_SPAN] * 2, "is named twice"),
        ([edgeless], [_SPAN], "has no edge; give it some, or leave the relation BorderBy out"),
        ([twice], [_SPAN], "has 2 channels"),
        ([city], [Span(0, 9999)], r"span of city .* \(0 to 9999\) must lie in its 336 steps"),
        ([dataclasses.replace(city, values=silent)], [_SPAN], "has no reading in its visible span"),
    ):
        with pytest.raises(InputError, match=expected):
            build_knowledge_graph(cities, spans, _CONFIG)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"relations": ()}, "`relations` is empty"),
        ({"relations": ("FlowsTo",)}, "relation 'FlowsTo' is unknown"),
        ({"relations": ("FlowTo", "FlowTo")}, "named twice"),
        ({"flow_neighbours": 0}, "`flow_neighbours` must be at least 1, got 0"),
    ],
)
def test_a_bad_configuration_is_named(fields, expected):
    with pytest.raises(InputError, match=expected):
        KnowledgeGraphConfig(**fields)


def test_a_split_keeps_a_triple_and_its_reverse_together(graph):
    train, validation, test = split_triples(graph.triples, validation=0.2, test=0.3, key=jax.random.key(0))
    parts = [set(map(tuple, part.tolist())) for part in (train, validation, test)]
    assert set.union(*parts) == set(map(tuple, graph.triples.tolist())) and sum(map(len, parts)) == len(graph.triples)
    everything = set.union(*parts)
    for part in parts:
        assert all((t, r, h) in part for h, r, t in part if (t, r, h) in everything)
    for relation in range(len(graph.relations)):
        share = (test[:, 1] == relation).sum() / (graph.triples[:, 1] == relation).sum()
        assert 0.1 < share < 0.5
    with pytest.raises(InputError, match="must be shares that add up to less than 1"):
        split_triples(graph.triples, validation=0.5, test=0.5, key=jax.random.key(0))


def test_groups_are_kinds_within_a_city(graph):
    groups = dict(zip(graph.entities, entity_groups(graph).tolist(), strict=True))
    first, second = (graph.regions(city) for city in graph.cities)
    assert len({groups[name] for name in first}) == 1 and groups[first[0]] != groups[second[0]]
    assert groups["city:crowd_0"] == groups["city:crowd_1"] != groups["function:0"] != groups["degree:1"]


def test_the_summary_counts_by_relation(graph):
    rows = {row["relation"]: row for row in graph.summary()}
    assert sum(int(row["triples"]) for row in rows.values()) == len(graph.triples)
    assert rows["BorderBy"]["mutual"] == rows["BorderBy"]["triples"] and rows["DegreeClass"]["heads"] == 16


def test_the_experiment_writes_what_it_summarises(tmp_path):
    command = [sys.executable, "-m", "experiments.build_knowledge_graph", f"--out_file={tmp_path / 'graph.tsv'}"]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "graph.tsv").read_text().splitlines()
    assert f"{len(lines)} triples of" in done.stdout and all(len(line.split("\t")) == 3 for line in lines)
    (tmp_path / "own.tsv").write_text("nobody\tBorderBy\tnowhere\n")
    failed = subprocess.run(
        [*command, f"--own_triples={tmp_path / 'own.tsv'}"], cwd=_ROOT, capture_output=True, text=True
    )
    assert failed.returncode == 2 and failed.stderr.startswith("error: ") and "line 1: entity 'nobody'" in failed.stderr
