"""In: small knowledge graphs. Out: TuckER that scores as its paper says, learns, ranks honestly and folds cities in."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gpdiff_jax.cities import City
from gpdiff_jax.cities.splits import Span
from gpdiff_jax.errors import InputError
from gpdiff_jax.prompts.urban_graph.embedding import (
    Embedding,
    evaluate_embedding,
    fold_in,
    train_embedding,
    translate_triples,
)
from gpdiff_jax.prompts.urban_graph.embedding_training import (
    EmbeddingConfig,
    make_query_answers,
    pad_query_answers,
    query_losses,
)
from gpdiff_jax.prompts.urban_graph.knowledge_graph import (
    KnowledgeGraph,
    KnowledgeGraphConfig,
    build_knowledge_graph,
    join_graphs,
)
from gpdiff_jax.prompts.urban_graph.ranking import filtered_ranks, rank_by_frequency, unpack
from gpdiff_jax.prompts.urban_graph.tucker import init_tucker, score_all
from gpdiff_jax.training.step import Part
from gpdiff_jax.vectors import padded_size
from tests.compilations import programs_made

_KEY = jax.random.key(0)
_ENTITIES, _RELATIONS, _WIDTH = 7, 3, 6


def _graph_of(triples: np.ndarray, num_entities: int, num_relations: int) -> KnowledgeGraph:
    return KnowledgeGraph(
        entities=tuple(f"concept:{k}" for k in range(num_entities)),
        relations=tuple(f"r{k}" for k in range(num_relations)),
        triples=triples.astype(np.int32),
        cities=(),
        city_of_entity=np.full(num_entities, -1, np.int32),
        centroids=np.zeros((0, 24), np.float32),
        config=KnowledgeGraphConfig(),
    )


@pytest.fixture(scope="module", name="clock")
def _clock() -> KnowledgeGraph:
    """Twelve hours: the next, the one before, and the one across; what one relation says follows from the others."""
    hours = np.arange(12)
    parts = [np.column_stack([hours, np.full(12, r), (hours + step) % 12]) for r, step in enumerate((1, -1, 6))]
    return _graph_of(np.concatenate(parts), 12, 3)


@pytest.fixture(scope="module", name="params")
def _params() -> dict:
    return init_tucker(_KEY, _ENTITIES, _RELATIONS, _WIDTH, 4)


def _paper_score(params: dict, head: int, relation: int, tail: int) -> float:
    """One triple's score as the paper writes it, in numpy; a doubled relation number asks for the head."""
    rows = {leaf: np.asarray(value, np.float64) for leaf, value in params.items()}
    h, r, t = rows["entities"][head], rows["relations"][relation], rows["entities"][tail]
    core = rows["core"].reshape(_WIDTH, 4, _WIDTH)
    return sum(core[i, j, k] * h[i] * r[j] * t[k] for i in range(_WIDTH) for j in range(4) for k in range(_WIDTH))


def test_triples_score_as_the_paper_says(params):
    heads, relations = jnp.asarray([0, 3, 6, 2]), jnp.asarray([0, 2, 4, 5])
    scores = score_all(params, heads, relations)
    expected = [
        [_paper_score(params, h, r, t) for t in range(_ENTITIES)]
        for h, r in zip(heads.tolist(), relations.tolist(), strict=True)
    ]
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)


def _loop_rank(scores: np.ndarray, truth: int, left_out: set[int]) -> float:
    rivals = [scores[k] for k in range(len(scores)) if k != truth and k not in left_out]
    best = 1 + sum(s > scores[truth] for s in rivals)
    worst = 1 + sum(s >= scores[truth] for s in rivals)
    return (best + worst) / 2


@given(
    scores=hnp.arrays(np.int8, (3, 9), elements=st.integers(-2, 2)),
    others=hnp.arrays(bool, (3, 9)),
    truth=st.lists(st.integers(0, 8), min_size=3, max_size=3),
)
def test_ranks_are_those_of_a_loop_with_ties_at_their_mean(scores, others, truth):
    got = filtered_ranks(jnp.asarray(scores, jnp.float32), jnp.asarray(truth), jnp.asarray(others))
    expected = [_loop_rank(scores[k], truth[k], set(np.flatnonzero(others[k]))) for k in range(3)]
    np.testing.assert_array_equal(got, expected)


def test_a_score_that_is_no_number_never_helps():
    nowhere = jnp.zeros((1, 4), bool)
    assert filtered_ranks(jnp.asarray([[jnp.nan, 1.0, 2.0, 0.0]]), jnp.asarray([0]), nowhere)[0] == 4
    assert filtered_ranks(jnp.asarray([[1.0, jnp.nan, 0.0, 0.0]]), jnp.asarray([0]), nowhere)[0] == 2


def test_bits_come_back_as_they_went():
    answers = np.random.default_rng(0).random((5, 19)) < 0.4
    packed = jnp.asarray(np.packbits(answers, axis=1, bitorder="little"))
    np.testing.assert_array_equal(unpack(packed, 19), answers)


def test_evaluation_agrees_with_a_loop_over_triples(params):
    rng = np.random.default_rng(3)
    triples = np.unique(np.column_stack([rng.integers(0, n, 20) for n in (_ENTITIES, _RELATIONS, _ENTITIES)]), axis=0)
    graph = _graph_of(triples, _ENTITIES, _RELATIONS)
    config = EmbeddingConfig(width=_WIDTH, relation_width=4)
    made = Embedding(params, jnp.zeros(0), graph.entities, graph.relations, config)
    groups = np.array([0, 0, 0, 0, 1, 1, 1], np.int32)
    for kinds in (None, groups):
        ranking = evaluate_embedding(made, graph, graph.triples[:9], graph.triples, kinds)
        known = set(map(tuple, triples.tolist()))
        for row, (h, r, t) in enumerate(triples[:9].tolist()):
            tails = np.asarray([_paper_score(params, h, r, k) for k in range(_ENTITIES)], np.float32)
            heads = np.asarray([_paper_score(params, t, r + _RELATIONS, k) for k in range(_ENTITIES)], np.float32)
            alien = [set() if kinds is None else {k for k in range(7) if kinds[k] != kinds[x]} for x in (t, h)]
            assert ranking.tail_ranks[row] == _loop_rank(
                tails, t, {k for k in range(_ENTITIES) if (h, r, k) in known} | alien[0]
            )
            assert ranking.head_ranks[row] == _loop_rank(
                heads, h, {k for k in range(_ENTITIES) if (k, r, t) in known} | alien[1]
            )
        ranks = np.concatenate(ranking)
        expected = {"mrr": (1 / ranks).mean()} | {f"hits@{k}": (ranks <= k).mean() for k in (1, 3, 10)}
        assert ranking.as_dict() == pytest.approx(expected, rel=1e-6)


def test_the_frequency_baseline_by_hand():
    train = np.array([[0, 0, 1], [2, 0, 1], [3, 0, 2]], np.int32)
    ranked = np.array([[4, 0, 1], [0, 0, 3]], np.int32)
    ranking = rank_by_frequency(ranked, train, np.concatenate([train, ranked]), 5, 1)
    # Tails: 1 was seen twice, so it leads; of (0, r, ?) its known answer 1 is left out, 2 leads, 3 ties with 0 and 4.
    np.testing.assert_array_equal(ranking.tail_ranks, [1.0, 3.0])
    # Heads of (?, r, 1): 0 and 2 are left out, 3 leads, 4 ties with 1. Of (?, r, 3): 0 ties with 2 and 3.
    np.testing.assert_array_equal(ranking.head_ranks, [2.5, 2.0])


def test_training_learns_what_follows_from_the_rest(clock):
    held = clock.triples[clock.triples[:, 1] == 2][:3]  # 0-6, 1-7 and 2-8; the other way round stays
    train = clock.triples[~(clock.triples[:, None] == held[None]).all(axis=2).any(axis=1)]
    config = EmbeddingConfig(
        width=16, relation_width=4, learning_rate=2e-2, batch=16, epochs=60, evaluate_every=20, dropout=0.0
    )
    made = train_embedding(clock, config, key=_KEY, train=train, validation=held)
    trained = evaluate_embedding(made, clock, train, clock.triples).mrr
    chance = rank_by_frequency(train, train, clock.triples, 12, 3).mrr
    assert trained > 2.5 * chance
    assert np.isfinite(made.validation_mrr[0]) and made.validation_mrr.shape == (3,)
    best = evaluate_embedding(made, clock, held, clock.triples).mrr
    assert best == pytest.approx(np.nanmax(made.validation_mrr), rel=1e-5)  # the best, not the last
    again = train_embedding(clock, config, key=_KEY, train=train, validation=held)
    chex.assert_trees_all_equal(made.params, again.params)


def test_training_stops_when_validation_no_longer_improves(clock):
    config = EmbeddingConfig(
        width=4, relation_width=2, learning_rate=1e-9, batch=64, epochs=10, evaluate_every=1, patience=2
    )
    made = train_embedding(clock, config, key=_KEY, train=clock.triples[:20], validation=clock.triples[20:])
    assert np.isfinite(made.validation_mrr).sum() == 3  # the first is the best, then patience runs out
    assert np.isnan(made.validation_mrr[3:]).all()


@pytest.fixture(scope="module", name="graphs")
def _graphs(simulated_cities: list[City]) -> tuple[KnowledgeGraph, KnowledgeGraph]:
    config = KnowledgeGraphConfig(function_classes=6, classes_per_region=2, district_size=4, near_neighbours=2)
    graph = build_knowledge_graph(simulated_cities[:2], [Span(0, 240)] * 2, config)
    later = build_knowledge_graph(simulated_cities[2:], [Span(0, 240)], config, centroids=graph.centroids)
    return graph, later


_SMALL = EmbeddingConfig(width=8, relation_width=4, learning_rate=1e-2, batch=64, epochs=60)


def test_a_city_is_folded_in_and_nothing_else_moves(graphs):
    graph, later = graphs
    made = train_embedding(graph, _SMALL, key=_KEY)
    folded = fold_in(made, later, key=jax.random.key(1), epochs=200)
    old = len(made.entities)
    np.testing.assert_array_equal(folded.params["entities"][:old], made.params["entities"])
    for leaf in made.params.keys() - {"entities"}:
        np.testing.assert_array_equal(folded.params[leaf], made.params[leaf])
    joined = join_graphs(graph, later)
    assert folded.entities == joined.entities and joined.relations == graph.relations
    assert (np.asarray(folded.params["entities"][old:]) != 0).any(axis=1).all()
    # Better than the start, which is all that is known of a new region before its triples are.
    still = dataclasses.replace(made, config=dataclasses.replace(made.config, learning_rate=1e-9))
    start = fold_in(still, later, key=jax.random.key(1), epochs=1)
    known = np.concatenate([graph.triples, translate_triples(later.triples, later, joined.entities, joined.relations)])
    new = known[len(graph.triples) :]
    ranked = [evaluate_embedding(each, joined, new, known).mrr for each in (start, folded)]
    assert ranked[1] > 1.2 * ranked[0]
    regions = later.regions(later.cities[0])
    assert folded.vectors(regions).shape == (len(regions), 8)
    with pytest.raises(InputError, match="is not in the embedding; fold its city in first"):
        made.vectors(regions)


def test_entities_and_rows_that_pad_teach_nothing(clock):
    config = EmbeddingConfig(width=4, relation_width=2, dropout=0.0)
    count, relations = len(clock.entities), len(clock.relations)
    exist = np.arange(count + 5) < count
    plain = make_query_answers(clock.triples, clock.triples, count, relations)
    padded = pad_query_answers(make_query_answers(clock.triples, clock.triples, count + 5, relations, exist))
    assert len(padded.answer) == padded_size(len(plain.answer)) > len(plain.answer) == 2 * len(clock.triples)
    params = init_tucker(_KEY, count, relations, 4, 2)
    wide = {**params, "entities": jnp.concatenate([params["entities"], 7.0 * jnp.ones((5, 4))])}
    rows, part = jnp.arange(len(plain.queries.heads), dtype=jnp.int32), Part(jnp.int32(0), 0, jnp.int32(0))

    @jax.jit
    def slope(params, training):
        return jax.value_and_grad(lambda p: query_losses(config, p, training, rows, part, len(rows), _KEY).sum())(
            params
        )

    (loss, grads), (other, others) = slope(params, plain), slope(wide, padded)
    assert float(other) == pytest.approx(float(loss), rel=1e-5)
    np.testing.assert_array_equal(others["entities"][count:], 0.0)
    others["entities"] = others["entities"][:count]
    chex.assert_trees_all_close(grads, others, rtol=1e-4, atol=1e-6)


def test_cities_of_like_size_are_folded_in_by_one_program(graphs, simulated_cities):
    graph, _ = graphs
    made = train_embedding(graph, dataclasses.replace(_SMALL, epochs=1), key=_KEY)
    config = KnowledgeGraphConfig(function_classes=6, classes_per_region=2, district_size=4, near_neighbours=2)
    fold = functools.partial(fold_in, made, key=_KEY, epochs=3)
    windows = [
        build_knowledge_graph(simulated_cities[2:], [span], config, centroids=graph.centroids)
        for span in (Span(0, 240), Span(24, 216), Span(100, 300))
    ]
    assert len({len(window.triples) for window in windows}) > 1
    fold(windows[0])
    with programs_made() as made_since:
        tables = [fold(window).params["entities"] for window in windows]
    assert not made_since
    assert (np.asarray(tables[0]) != np.asarray(tables[1])).any()


def test_what_cannot_be_folded_in_is_refused(graphs, clock):
    graph, later = graphs
    made = train_embedding(graph, _SMALL, key=_KEY)
    with pytest.raises(InputError, match="no entity that the embedding does not hold already"):
        fold_in(made, graph, key=_KEY)
    with pytest.raises(InputError, match="no new entity is in a triple of a relation that the embedding knows"):
        fold_in(made, clock, key=_KEY)
    with pytest.raises(InputError, match=r"the triple \(region:crowd_2/.*\) names what the embedding does not hold"):
        evaluate_embedding(made, later, later.triples[:1], later.triples)
    with pytest.raises(InputError, match="`triples` is empty"):
        evaluate_embedding(made, graph, graph.triples[:0], graph.triples)
    with pytest.raises(InputError, match="has no triple to train on"):
        train_embedding(graph, _SMALL, key=_KEY, train=graph.triples[:0])


def test_training_that_blows_up_is_said_in_a_line(clock):
    config = EmbeddingConfig(width=4, relation_width=2, learning_rate=1e38, batch=64, epochs=2, evaluate_every=1)
    with pytest.raises(InputError, match="loss or its gradient is not finite at step 2; lower its learning rate"):
        train_embedding(clock, config, key=_KEY)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"width": 0}, "`width` must be at least 1, got 0"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be above 0, got nan"),
        ({"dropout": 1.0}, r"`dropout` must be in 0..1, below 1, got 1.0"),
        ({"relation_width": 0}, "`relation_width` must be at least 1, got 0"),
    ],
)
def test_a_bad_configuration_is_named(fields, expected):
    with pytest.raises(InputError, match=expected):
        EmbeddingConfig(**fields)
