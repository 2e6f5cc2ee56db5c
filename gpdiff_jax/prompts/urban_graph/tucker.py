"""In: vectors of entities and relations. Out: scores of triples by TuckER (Balazevic et al., arXiv 1901.09590).

A query is a head and a relation; its answer is a tail. Relations are numbered twice: r asks for the tail, r + R for the
head, by an inverse with a vector of its own (Lacroix et al., arXiv 1806.07297).
"""

import jax
from jaxtyping import Array, Float, Int

from gpdiff_jax.typing import Key, Params


def init_tucker(key: Key, num_entities: int, num_relations: int, width: int, relation_width: int) -> Params:
    """Random parameters.

    Args:
      key: random key.
      num_entities: rows of "entities", float32 [entities, width].
      num_relations: R; "relations" has a row for each and one for its inverse, float32 [2 R, relation_width].
      width: of an entity's vector.
      relation_width: of a relation's vector.

    Returns:
      The two, and "core", the core tensor as a matrix, float32 [width, relation_width * width].
    """
    entity_key, relation_key, core_key = jax.random.split(key, 3)
    return {
        "entities": jax.random.normal(entity_key, (num_entities, width)) * width**-0.5,
        "relations": jax.random.normal(relation_key, (2 * num_relations, relation_width)),
        "core": jax.random.normal(core_key, (width, relation_width * width)) * (width * relation_width) ** -0.5,
    }


def query_vectors(
    params: Params, heads: Float[Array, "B width"], relations: Int[Array, " B"]
) -> Float[Array, "B width"]:
    """Core tensor times head and relation (equation 1); its inner product with a tail is the score of the triple."""
    rows = params["relations"][relations]
    mixed = (heads @ params["core"]).reshape(len(heads), rows.shape[1], -1)
    return (rows[:, :, None] * mixed).sum(axis=1)


def score_all(params: Params, heads: Int[Array, " B"], relations: Int[Array, " B"]) -> Float[Array, "B entities"]:
    """Scores of every entity as the answer of B queries, the higher the likelier."""
    return query_vectors(params, params["entities"][heads], relations) @ params["entities"].T
