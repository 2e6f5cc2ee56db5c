"""In: vectors of entities and relations. Out: scores of triples, by one of five models behind one interface.

A query is a head and a relation; its answer is a tail. Relations are numbered twice: r asks for the tail, r + R for the
head, by its inverse. TuckER, DistMult and ComplEx learn a vector for the inverse (Lacroix et al., arXiv 1806.07297); in
TransE and RotatE it follows from the relation's own, so that both questions give a triple the same score.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gpdiff_jax.errors import InputError
from gpdiff_jax.typing import Key, Params


class Scorer(NamedTuple):
    """A model of triples as pure functions.

    `init(key, num_entities, num_relations, width, relation_width, margin)` makes parameters, with the rows of the
    entities, [entities, width], under "entities". `query(params, heads, relations)` turns vectors of heads [B, width]
    and doubled relation numbers [B] into what an answer should look like, [B, width]. `compare(queries, candidates,
    margin)` scores every candidate [K, width] as its answer, [B, K].
    """

    init: Callable[[Key, int, int, int, int, float], Params]
    query: Callable[[Params, jax.Array, jax.Array], jax.Array]
    compare: Callable[[jax.Array, jax.Array, float], jax.Array]
    scores_all: bool  # trained on all entities at once; else on negatives, drawn and weighted
    halves: bool  # a vector is the real and the imaginary half of a complex one


def scorer(name: str) -> Scorer:
    """The model of a name.

    Raises:
      InputError: unknown.
    """
    if name not in _SCORERS:
        raise InputError(f"`model` (={name!r}) is no embedding; choose from {', '.join(_SCORERS)}")
    return _SCORERS[name]


def scorer_names() -> tuple[str, ...]:
    """Names of all models, the default first."""
    return tuple(_SCORERS)


def score_all(
    model: Scorer, params: Params, heads: Int[Array, " B"], relations: Int[Array, " B"], margin: float
) -> Float[Array, "B entities"]:
    """Scores of every entity as the answer of B queries, the higher the likelier."""
    return model.compare(model.query(params, params["entities"][heads], relations), params["entities"], margin)


def _bilinear_init(key: Key, entities: int, relations: int, width: int, relation_width: int, margin: float) -> Params:
    del relation_width, margin
    entity_key, relation_key = jax.random.split(key)
    return {
        "entities": jax.random.normal(entity_key, (entities, width)) * width**-0.5,
        "relations": jax.random.normal(relation_key, (2 * relations, width)),
    }


def _tucker_init(key: Key, entities: int, relations: int, width: int, relation_width: int, margin: float) -> Params:
    del margin
    entity_key, relation_key, core_key = jax.random.split(key, 3)
    return {
        "entities": jax.random.normal(entity_key, (entities, width)) * width**-0.5,
        "relations": jax.random.normal(relation_key, (2 * relations, relation_width)),
        "core": jax.random.normal(core_key, (width, relation_width * width)) * (width * relation_width) ** -0.5,
    }


def _tucker_query(params: Params, heads: jax.Array, relations: jax.Array) -> jax.Array:
    """Core tensor times head and relation (Balazevic et al., arXiv 1901.09590, equation 1)."""
    rows = params["relations"][relations]
    mixed = (heads @ params["core"]).reshape(len(heads), rows.shape[1], -1)
    return (rows[:, :, None] * mixed).sum(axis=1)


def _distmult_query(params: Params, heads: jax.Array, relations: jax.Array) -> jax.Array:
    """Element by element (Yang et al., arXiv 1412.6575, equation 2)."""
    return heads * params["relations"][relations]


def _complex_query(params: Params, heads: jax.Array, relations: jax.Array) -> jax.Array:
    """Complex product; its real part with the conjugate tail is the score (Trouillon et al., arXiv 1606.06357)."""
    return _times(heads, params["relations"][relations])


def _times(x: jax.Array, y: jax.Array) -> jax.Array:
    real, imaginary = jnp.split(x, 2, axis=1)
    real_y, imaginary_y = jnp.split(y, 2, axis=1)
    return jnp.concatenate([real * real_y - imaginary * imaginary_y, real * imaginary_y + imaginary * real_y], axis=1)


def _inner(queries: jax.Array, candidates: jax.Array, margin: float) -> jax.Array:
    del margin
    return queries @ candidates.T


def _transe_init(key: Key, entities: int, relations: int, width: int, relation_width: int, margin: float) -> Params:
    del relation_width
    entity_key, relation_key = jax.random.split(key)
    bound = (margin + 2.0) / width
    return {
        "entities": jax.random.uniform(entity_key, (entities, width), minval=-bound, maxval=bound),
        "relations": jax.random.uniform(relation_key, (relations, width), minval=-bound, maxval=bound),
    }


def _signed(params: Params, relations: jax.Array) -> jax.Array:
    """Rows of doubled relation numbers; an inverse is the relation's own row with its sign turned."""
    count = params["relations"].shape[0]
    return params["relations"][relations % count] * jnp.where(relations < count, 1.0, -1.0)[:, None]


def _transe_query(params: Params, heads: jax.Array, relations: jax.Array) -> jax.Array:
    """Translation (Bordes et al., NIPS 2013)."""
    return heads + _signed(params, relations)


def _l1_distance(queries: jax.Array, candidates: jax.Array, margin: float) -> jax.Array:
    return margin - jnp.abs(queries[:, None] - candidates[None]).sum(axis=2)


def _rotate_init(key: Key, entities: int, relations: int, width: int, relation_width: int, margin: float) -> Params:
    params = _transe_init(key, entities, relations, width, relation_width, margin)
    phases = jax.random.uniform(jax.random.fold_in(key, 2), (relations, width // 2), minval=-jnp.pi, maxval=jnp.pi)
    return params | {"relations": phases}


def _rotate_query(params: Params, heads: jax.Array, relations: jax.Array) -> jax.Array:
    """Rotation in the complex plane (Sun et al., arXiv 1902.10197, equation 2)."""
    phases = _signed(params, relations)
    return _times(heads, jnp.concatenate([jnp.cos(phases), jnp.sin(phases)], axis=1))


def _modulus_distance(queries: jax.Array, candidates: jax.Array, margin: float) -> jax.Array:
    real, imaginary = jnp.split(queries[:, None] - candidates[None], 2, axis=2)
    # A root has no gradient at zero.
    return margin - jnp.sqrt(jnp.square(real) + jnp.square(imaginary) + 1e-9).sum(axis=2)


_SCORERS = {
    "tucker": Scorer(_tucker_init, _tucker_query, _inner, scores_all=True, halves=False),
    "transe": Scorer(_transe_init, _transe_query, _l1_distance, scores_all=False, halves=False),
    "distmult": Scorer(_bilinear_init, _distmult_query, _inner, scores_all=True, halves=False),
    "complex": Scorer(_bilinear_init, _complex_query, _inner, scores_all=True, halves=True),
    "rotate": Scorer(_rotate_init, _rotate_query, _modulus_distance, scores_all=False, halves=True),
}
