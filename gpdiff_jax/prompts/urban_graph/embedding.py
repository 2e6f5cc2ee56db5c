"""In: a knowledge graph. Out: a vector for every entity, trained so that triples can be told from what is no triple.

A city that comes later is folded in: its own entities get vectors, and nothing else moves by a bit.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import flax.struct
import jax
import numpy as np
from jaxtyping import Array, Float, Int

from gpdiff_jax.errors import InputError
from gpdiff_jax.prompts.urban_graph.embedding_training import (
    EmbeddingConfig,
    make_query_answers,
    pad_query_answers,
    train_rows,
)
from gpdiff_jax.prompts.urban_graph.knowledge_graph import KnowledgeGraph
from gpdiff_jax.prompts.urban_graph.ranking import Ranking, rank_triples
from gpdiff_jax.prompts.urban_graph.tucker import init_tucker
from gpdiff_jax.typing import Device, Key, Params
from gpdiff_jax.vectors import padded_size

_STEPS_AT_ONCE = 50  # of folding in


@flax.struct.dataclass
class Embedding:
    """A trained embedding: vectors of entities and relations, and what they are called."""

    params: Params  # see `tucker.init_tucker`
    validation_mrr: Float[Array, "*devices evaluations"]  # NaN after training has stopped, and without validation
    entities: tuple[str, ...] = flax.struct.field(pytree_node=False)
    relations: tuple[str, ...] = flax.struct.field(pytree_node=False)
    config: EmbeddingConfig = flax.struct.field(pytree_node=False)

    def vectors(self, entities: Sequence[str]) -> Float[Array, "X width"]:
        """Vectors of entities by name.

        Raises:
          InputError: an entity that the embedding does not hold.
        """
        number = {name: index for index, name in enumerate(self.entities)}
        for name in entities:
            if name not in number:
                raise InputError(f"entity {name!r} is not in the embedding; fold its city in first")
        return self.params["entities"][np.asarray([number[name] for name in entities], np.int32)]


def train_embedding(
    graph: KnowledgeGraph,
    config: EmbeddingConfig = EmbeddingConfig(),
    *,
    key: Key,
    train: Int[np.ndarray, "X 3"] | None = None,
    validation: Int[np.ndarray, "Y 3"] | None = None,
    devices: Sequence[Device] | None = None,
    checkpoints: pathlib.Path | None = None,
) -> Embedding:
    """Embeds a knowledge graph.

    Args:
      graph: names, and the numbers that triples use.
      config: sizes and training.
      key: random key.
      train: int32 [X, 3], the triples to learn from; None for all of the graph's.
      validation: int32 [Y, 3], held-out triples for early stopping; None trains all epochs.
      devices: see `parallel.training_devices`.
      checkpoints: see `loop.train`.

    Returns:
      The embedding with the best filtered MRR on the validation triples.

    Raises:
      InputError: no triple to train on.
      NotFiniteError: a loss or its gradient is not finite; names the step.
    """
    train = graph.triples if train is None else train
    if len(train) == 0:
        raise InputError("the knowledge graph has no triple to train on; give it more relations")
    init_key, train_key = jax.random.split(key)
    num_entities, num_relations = len(graph.entities), len(graph.relations)
    init = jax.jit(init_tucker, static_argnums=(1, 2, 3, 4))
    params = init(init_key, num_entities, num_relations, config.width, config.relation_width)
    rows = make_query_answers(train, train, num_entities, num_relations)
    held_out = None
    if validation is not None and len(validation):
        known = np.concatenate([train, validation])
        held_out = make_query_answers(validation, known, num_entities, num_relations)
    trained = train_rows(config, params, {}, rows, held_out, key=train_key, devices=devices, checkpoints=checkpoints)
    history = np.full(1 if held_out is None else -(-config.epochs // config.evaluate_every), np.nan, np.float32)
    if held_out is not None:
        history[: len(trained.validation)] = -trained.validation
    return Embedding(trained.params, jax.device_put(history), graph.entities, graph.relations, config)


def fold_in(
    embedding: Embedding,
    graph: KnowledgeGraph,
    *,
    key: Key,
    train: Int[np.ndarray, "X 3"] | None = None,
    epochs: int = 100,
) -> Embedding:
    """Adds the entities of cities that came later; all that was trained before stays as it is, bit for bit.

    Args:
      embedding: trained on other cities.
      graph: of the new cities, built with the `centroids` of the first graph.
      key: random key.
      train: int32 [X, 3] in the numbers of `graph`, the triples to learn from; None for all. Those between entities
        that are all known already teach nothing, and those of a relation that the embedding never met are left out.
      epochs: how long at least; the steps are rounded up to whole calls of 50.

    Returns:
      The embedding with the new entities after the old ones; they start from the mean of the known entities of their
      kind (regions, districts and so on).

    Raises:
      InputError: no new entity, or none of them in a triple of a known relation.
    """
    held = set(embedding.entities)
    new = tuple(name for name in graph.entities if name not in held)
    if not new:
        raise InputError("the graph has no entity that the embedding does not hold already; give it a new city")
    first, num_relations = len(embedding.entities), len(embedding.relations)
    entities = embedding.entities + new
    old_size, new_size = padded_size(first), padded_size(len(new))
    train = graph.triples if train is None else train
    translated = translate_triples(train, graph, entities, embedding.relations)
    translated = translated[(translated[:, 1] >= 0) & (translated[:, [0, 2]] >= first).any(axis=1)]
    if len(translated) == 0:
        raise InputError("no new entity is in a triple of a relation that the embedding knows; give the graph more")
    # Known and new entities, queries and answers are padded to few sizes, each with its own: windows of one city, and
    # most cities, then share one compiled program.
    ends = translated[:, [0, 2]]
    translated[:, [0, 2]] = np.where(ends < first, ends, ends + (old_size - first))
    number = np.arange(old_size + new_size)
    exist = (number < first) | ((number >= old_size) & (number < old_size + len(new)))
    init_key, train_key = jax.random.split(key)
    rows = _start_of(new, embedding, new_size, init_key)
    config = dataclasses.replace(embedding.config, epochs=epochs)
    training = make_query_answers(translated, translated, old_size + new_size, num_relations, exist)
    known = np.asarray(embedding.params["entities"])
    frozen = {**embedding.params, "entities": np.pad(known, ((0, old_size - first), (0, 0)))}
    trained = train_rows(
        config,
        {"entities": rows},
        frozen,
        pad_query_answers(training),
        None,
        key=train_key,
        num_queries=len(training.queries.heads),
        steps_at_once=_STEPS_AT_ONCE,
    )
    added = np.asarray(trained.params["entities"])[: len(new)]
    params = {**embedding.params, "entities": jax.device_put(np.concatenate([known, added]))}
    return dataclasses.replace(embedding, params=params, entities=entities)


def evaluate_embedding(
    embedding: Embedding,
    graph: KnowledgeGraph,
    triples: Int[np.ndarray, "X 3"],
    known: Int[np.ndarray, "Y 3"],
    groups: Int[np.ndarray, " entities"] | None = None,
) -> Ranking:
    """Filtered ranks of triples, as queries for their tail and for their head.

    Args:
      embedding: the trained or folded-in embedding; all its entities can be an answer.
      graph: gives the numbers that `triples` and `known` use.
      triples: int32 [X, 3], to rank; at least one.
      known: int32 [Y, 3], triples held to be true; their answers are left out of each other's rankings. Those that the
        embedding cannot answer are ignored.
      groups: int32 [entities of the embedding] (see `entity_groups`); if given, only entities of the truth's own
        group are its rivals, a harder question.

    Returns:
      Ranks, MRR and Hits@k; of ties, the mean of the optimistic and the pessimistic rank.

    Raises:
      InputError: no triple, or one with an entity or a relation that the embedding does not hold.
    """
    if len(triples) == 0:
        raise InputError("`triples` is empty; give at least one to rank")
    names = (embedding.entities, embedding.relations)
    ranked, true = translate_triples(triples, graph, *names), translate_triples(known, graph, *names)
    if (ranked < 0).any():
        head, middle, tail = triples[np.argmax((ranked < 0).any(axis=1))].tolist()
        named = f"({graph.entities[head]}, {graph.relations[middle]}, {graph.entities[tail]})"
        raise InputError(f"the triple {named} names what the embedding does not hold; fold its city in or leave it out")
    true = true[(true >= 0).all(axis=1)]
    return rank_triples(embedding.params, ranked, true, len(embedding.relations), groups)


def translate_triples(
    triples: Int[np.ndarray, "X 3"], graph: KnowledgeGraph, entities: tuple[str, ...], relations: tuple[str, ...]
) -> Int[np.ndarray, "X 3"]:
    """Triples from the numbers of a graph to those of an embedding or of another graph; -1 for what it lacks."""
    if (graph.entities, graph.relations) == (entities, relations):
        return triples
    places = []
    for names, wanted in ((graph.entities, entities), (graph.relations, relations)):
        number = {name: index for index, name in enumerate(wanted)}
        places.append(np.asarray([number.get(name, -1) for name in names], np.int32))
    entity, relation = places
    return np.column_stack([entity[triples[:, 0]], relation[triples[:, 1]], entity[triples[:, 2]]])


def _start_of(new: Sequence[str], embedding: Embedding, size: int, key: Key) -> np.ndarray:
    """float32 [size, width], of which the first are those of the new entities."""
    old = np.asarray(embedding.params["entities"])
    kinds = np.asarray([name.partition(":")[0] for name in embedding.entities])
    means = {kind: old[kinds == kind].mean(axis=0) for kind in set(kinds.tolist())}
    rows = [means.get(name.partition(":")[0], old.mean(axis=0)) for name in new]
    noise = np.asarray(_normal(key, (size, old.shape[1])))
    noise = noise * np.float32(0.1 * float(old.std()))
    noise[: len(new)] += np.stack(rows)
    return noise


@functools.partial(jax.jit, static_argnums=1)
def _normal(key: Key, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape)
