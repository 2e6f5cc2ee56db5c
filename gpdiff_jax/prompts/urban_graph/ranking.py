"""In: an embedding and triples. Out: how well it answers them, as filtered MRR and Hits@k, beside plain frequency."""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from gpdiff_jax.prompts.urban_graph.tucker import score_all
from gpdiff_jax.typing import Params

HITS = (1, 3, 10)
_CHUNK = 64  # queries scored at once


@flax.struct.dataclass
class Queries:
    """Q queries, each a head and a relation, with all their known answers packed eight to a byte."""

    heads: Int[Array, "*devices Q"]
    relations: Int[Array, "*devices Q"]  # doubled
    answers: UInt8[Array, "*devices Q bytes"]  # ceil(entities / 8) bytes


class Ranking(NamedTuple):
    """Filtered ranks of triples from both sides, in the order of the triples."""

    tail_ranks: Float[np.ndarray, " X"]  # mean of the optimistic and the pessimistic rank; 1 is best
    head_ranks: Float[np.ndarray, " X"]

    @property
    def mrr(self) -> float:
        """Mean reciprocal rank over both sides."""
        return float(np.mean(1.0 / np.concatenate(self)))

    def hits(self, k: int) -> float:
        """Share of the ranks that are at most k, over both sides."""
        return float(np.mean(np.concatenate(self) <= k))

    def as_dict(self) -> dict[str, float]:
        """MRR and Hits@1, 3 and 10."""
        return {"mrr": self.mrr} | {f"hits@{k}": self.hits(k) for k in HITS}


def both_ways(triples: Int[np.ndarray, "X 3"], num_relations: int) -> Int[np.ndarray, "2*X 3"]:
    """Triples, then the same as asked for their heads: (tail, relation + R, head)."""
    turned = np.column_stack([triples[:, 2], triples[:, 1] + num_relations, triples[:, 0]])
    return np.concatenate([triples, turned]).astype(np.int32)


def group_queries(
    triples: Int[np.ndarray, "X 3"], known: Int[np.ndarray, "Y 3"], num_entities: int
) -> tuple[Queries, Int[np.ndarray, " X"]]:
    """Finds the different queries of triples, and all their known answers.

    Args:
      triples: int32 [X, 3], doubled.
      known: int32 [Y, 3], doubled; all triples held to be true.
      num_entities: how many can be an answer.

    Returns:
      Q queries, and for every triple the number of its query.
    """
    count = int(max(triples[:, 1].max(initial=0), known[:, 1].max(initial=0))) + 1
    numbers, query = np.unique(triples[:, 0].astype(np.int64) * count + triples[:, 1], return_inverse=True)
    packed = np.zeros((len(numbers), -(-num_entities // 8)), np.uint8)
    number = known[:, 0].astype(np.int64) * count + known[:, 1]
    place = np.minimum(np.searchsorted(numbers, number), max(len(numbers) - 1, 0))
    hit = numbers[place] == number if len(numbers) else np.zeros(len(number), bool)
    tail = known[hit, 2]
    np.bitwise_or.at(packed, (place[hit], tail >> 3), np.left_shift(1, tail & 7).astype(np.uint8))
    heads, relations = (numbers // count).astype(np.int32), (numbers % count).astype(np.int32)
    return Queries(*jax.device_put((heads, relations, packed))), query.reshape(-1)


def unpack(answers: Array, num_entities: int) -> Bool[Array, "B entities"]:
    """The answers of B queries, from eight to a byte to one each."""
    bits = (answers[:, :, None] >> jnp.arange(8, dtype=jnp.uint8)[None, None]) & jnp.uint8(1)
    return bits.reshape(len(answers), -1)[:, :num_entities].astype(bool)


def filtered_ranks(
    scores: Float[Array, "B entities"], truth: Int[Array, " B"], others: Bool[Array, "B entities"]
) -> Float[Array, " B"]:
    """Ranks of the true answers among all entities but the other known answers.

    Equal scores count half, the mean of the best and the worst order of ties (Berrendorf et al., arXiv 2002.06914). A
    score that is not a number never helps.

    Args:
      scores: the higher the likelier.
      truth: number of the right answer.
      others: entities left out of the ranking; the truth itself never is.

    Returns:
      Ranks, 1 or more; whole or half numbers.
    """
    own = jnp.take_along_axis(scores, truth[:, None], axis=1)
    rivals = ~others & (jnp.arange(scores.shape[1])[None] != truth[:, None])
    above = (rivals & ~(scores <= own)).sum(axis=1)
    not_below = (rivals & ~(scores < own)).sum(axis=1)
    return 1.0 + 0.5 * (above + not_below).astype(jnp.float32)


def query_ranks(
    params: Params,
    queries: Queries,
    query: Int[Array, " X"],
    truth: Int[Array, " X"],
    groups: Int[Array, " entities"] | None,
) -> Float[Array, " X"]:
    """Filtered ranks of X answers; pure, for use inside a compiled loop.

    Args:
      params: of the embedding.
      queries: with the answers to leave out.
      query: number of every answer's query.
      truth: number of the right answer.
      groups: if not None, only entities of the truth's own group are its rivals.

    Returns:
      Ranks [X].
    """
    num_entities = params["entities"].shape[0]

    def rank(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        chosen, answer = row
        scores = score_all(params, queries.heads[chosen], queries.relations[chosen])
        others = unpack(queries.answers[chosen], num_entities)
        if groups is not None:
            others = others | (groups[None] != groups[answer][:, None])
        return filtered_ranks(scores, answer, others)

    count = len(truth)
    filled = jnp.minimum(jnp.arange(-(-count // _CHUNK) * _CHUNK), count - 1).reshape(-1, _CHUNK)
    return jax.lax.map(rank, (query[filled], truth[filled])).reshape(-1)[:count]


_compiled_ranks = jax.jit(query_ranks)


def rank_triples(
    params: Params,
    triples: Int[np.ndarray, "X 3"],
    known: Int[np.ndarray, "Y 3"],
    num_relations: int,
    groups: Int[np.ndarray, " entities"] | None = None,
) -> Ranking:
    """Filtered ranks of triples from both sides; see `evaluate_embedding` for a trained one."""
    num_entities = params["entities"].shape[0]
    rows = both_ways(triples, num_relations)
    queries, query = group_queries(rows, both_ways(known, num_relations), num_entities)
    truth, kinds = jnp.asarray(rows[:, 2]), None if groups is None else jnp.asarray(groups)
    ranks = np.asarray(_compiled_ranks(params, queries, jnp.asarray(query.astype(np.int32)), truth, kinds))
    return Ranking(ranks[: len(triples)], ranks[len(triples) :])


def rank_by_frequency(
    triples: Int[np.ndarray, "X 3"],
    train: Int[np.ndarray, "Y 3"],
    known: Int[np.ndarray, "Z 3"],
    num_entities: int,
    num_relations: int,
    groups: Int[np.ndarray, " entities"] | None = None,
) -> Ranking:
    """The baseline: an answer is the likelier the more often it is one to the same relation in training.

    Args:
      triples: int32 [X, 3], to rank.
      train: int32 [Y, 3], where frequencies come from.
      known: int32 [Z, 3], all true triples, left out of the ranking.
      num_entities: entities that can be an answer.
      num_relations: R.
      groups: int32 [entities]; if given, only entities of the truth's own group are its rivals.

    Returns:
      Filtered ranks from both sides.
    """
    counts = np.zeros((2 * num_relations, num_entities), np.float32)
    doubled = both_ways(train, num_relations)
    np.add.at(counts, (doubled[:, 1], doubled[:, 2]), 1.0)
    rows = both_ways(triples, num_relations)
    queries, query = group_queries(rows, both_ways(known, num_relations), num_entities)
    ranks = [np.zeros(0, np.float32)]
    for part in np.array_split(np.arange(len(rows)), max(1, len(rows) // 1024)):
        truth = rows[part, 2]
        others = np.asarray(unpack(queries.answers[query[part]], num_entities))
        if groups is not None:
            others = others | (groups[None] != groups[truth][:, None])
        scores = jnp.asarray(counts[rows[part, 1]])
        ranks.append(np.asarray(filtered_ranks(scores, jnp.asarray(truth), jnp.asarray(others))))
    joined = np.concatenate(ranks)
    return Ranking(joined[: len(triples)], joined[len(triples) :])
