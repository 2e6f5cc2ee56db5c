"""In: triples as queries and their answers, and parameters. Out: the parameters trained on them."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from gpdiff_jax.errors import InputError, check_above_zero, check_at_least, named
from gpdiff_jax.prompts.urban_graph.ranking import Queries, both_ways, group_queries, query_ranks, unpack
from gpdiff_jax.prompts.urban_graph.tucker import query_vectors
from gpdiff_jax.training.caches import bounded_cache
from gpdiff_jax.training.loop import VALIDATION, Trained, train
from gpdiff_jax.training.optimisers import clipped_adam
from gpdiff_jax.training.parallel import DEVICES, training_devices
from gpdiff_jax.training.step import LossTerm, Part, TrainState, make_step, start_training
from gpdiff_jax.typing import Device, Key, Params
from gpdiff_jax.vectors import padded_size


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
    """How large a TuckER embedding is, and how it is trained.

    All entities are scored at once (Dettmers et al., arXiv 1707.01476): binary cross-entropy with `label_smoothing`,
    `dropout` on the head and on the query, one batch row per head and relation.

    Training stops when `patience` evaluations on the validation triples have not raised the filtered MRR, and the best
    parameters are kept; an evaluation follows every `evaluate_every` epochs, the last one on or after `epochs`.

    Raises:
      InputError: a number out of its range.
    """

    width: int = 128
    relation_width: int = 16
    learning_rate: float = 3e-3
    batch: int = 128
    epochs: int = 100
    evaluate_every: int = 5
    patience: int = 4
    dropout: float = 0.3
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        check_at_least(1, named(self, "width", "relation_width", "batch", "epochs", "evaluate_every", "patience"))
        check_above_zero(named(self, "learning_rate"))
        for name in ("dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"`{name}` must be in 0..1, below 1, got {getattr(self, name)}")


class QueryAnswers(NamedTuple):
    """Q queries with all their answers, and X single answers, each with the number of its query."""

    queries: Queries
    query: Int[Array, " X"]
    answer: Int[Array, " X"]
    entities: Float[Array, " entities"]  # 1 for those that exist, 0 for padding


def make_query_answers(
    triples: Int[np.ndarray, "X 3"],
    known: Int[np.ndarray, "Y 3"],
    num_entities: int,
    num_relations: int,
    exist: Bool[np.ndarray, " entities"] | None = None,
) -> QueryAnswers:
    """Queries of triples from both sides.

    Args:
      triples: int32 [X, 3], what is to be learned or ranked.
      known: int32 [Y, 3], all triples held to be true.
      num_entities: how many can be an answer.
      num_relations: in one direction.
      exist: bool [entities], which of them are more than padding; None for all.

    Returns:
      The queries and their 2 X answers.
    """
    rows = both_ways(triples, num_relations)
    queries, query = group_queries(rows, both_ways(known, num_relations), num_entities)
    real = np.ones(num_entities, np.float32) if exist is None else exist.astype(np.float32)
    return QueryAnswers(queries, *jax.device_put((query.astype(np.int32), rows[:, 2], real)))


def pad_query_answers(rows: QueryAnswers) -> QueryAnswers:
    """The same with queries and answers filled up to a padded size; `train_rows` takes how many are real."""

    def fill(leaf: jax.Array) -> jax.Array:
        host = np.asarray(leaf)
        more = padded_size(len(host)) - len(host)
        return jax.device_put(np.pad(host, [(0, more), *((0, 0) for _ in host.shape[1:])]))

    queries, query, answer = jax.tree.map(fill, rows[:3])
    return rows._replace(queries=queries, query=query, answer=answer)


def assemble(free: Params, frozen: Params) -> Params:
    """All parameters: the free ones alone, or new rows of entities below the frozen ones."""
    if not frozen:
        return free
    return {**frozen, "entities": jnp.concatenate([frozen["entities"], free["entities"]])}


class EmbeddingData(NamedTuple):
    """What every step of training an embedding reads."""

    frozen: Params  # of a trained embedding, whose entities stay; empty where all is free
    training: QueryAnswers
    validation: QueryAnswers | None
    order_key: Key  # of the order in which an epoch takes its queries
    num_queries: Int[Array, ""]  # of training that are more than padding


def train_rows(
    config: EmbeddingConfig,
    free: Params,
    frozen: Params,
    training: QueryAnswers,
    validation: QueryAnswers | None,
    *,
    key: Key,
    devices: Sequence[Device] | None = None,
    checkpoints: pathlib.Path | None = None,
    num_queries: int | None = None,
    steps_at_once: int | None = None,
) -> Trained:
    """Trains parameters to answer queries.

    Args:
      config: sizes and training.
      free: the parameters to train.
      frozen: those that stay as they are; see `assemble`.
      training: what to learn from.
      validation: held-out triples for early stopping; None trains all epochs.
      key: random key.
      devices: see `parallel.training_devices`; they share the rows of a batch.
      checkpoints: see `loop.train`.
      num_queries: of padded `training`, how many queries are real; None for all.
      steps_at_once: steps of one call of one program, of which there are whole ones; a program then fits any number of
        epochs. None for those from one evaluation to the next, or of as many epochs where nothing is evaluated.

    Returns:
      The free parameters with the best filtered MRR; the validation losses are MRR with a minus.

    Raises:
      NotFiniteError: a loss or its gradient is not finite; names the step.
    """
    padded = len(training.queries.heads)
    queries = padded if num_queries is None else num_queries
    batch = min(config.batch, padded)
    per_epoch, devices = -(-queries // batch), training_devices(batch, devices)
    every = 1 if validation is None else config.evaluate_every
    optimiser = _optimiser(config.learning_rate)
    train_key, order_key = jax.random.split(key)
    steps, at_once = -(-config.epochs // every) * every * per_epoch, config.evaluate_every * per_epoch
    if steps_at_once is not None:
        steps, at_once = -(-steps // steps_at_once) * steps_at_once, steps_at_once
    return train(
        make_embedding_step(optimiser, dataclasses.replace(config, epochs=1), batch, len(devices)),
        start_training(free, optimiser),
        EmbeddingData(frozen, training, validation, order_key, jax.device_put(np.int32(queries))),
        key=train_key,
        steps=steps,
        evaluate_every=at_once,
        devices=devices,
        name="knowledge-graph embedding",
        evaluate=None if validation is None else _make_evaluate(len(validation.answer), len(devices)),
        patience=config.patience,
        checkpoints=checkpoints,
        settings=config,
    )


@bounded_cache(32)
def _optimiser(learning_rate: float) -> optax.GradientTransformation:
    """One object for one rate: what was compiled for it is found again."""
    return clipped_adam(learning_rate)


@bounded_cache(8)
def make_embedding_step(
    optimiser: optax.GradientTransformation, config: EmbeddingConfig, batch: int, num_devices: int
) -> Callable[[TrainState, EmbeddingData, Key], tuple[TrainState, dict[str, jax.Array]]]:
    """One step of training an embedding, for `loop.train`; every epoch takes the queries in an order of its own.

    Nothing of one graph is in it, so that another of the same padded size finds it compiled.

    Args:
      optimiser: of the free parameters.
      config: the losses; its number of epochs plays no part.
      batch: B, queries of a step. The last batch of an epoch is filled up from its first queries.
      num_devices: that share the work.

    Returns:
      See `step.make_step`.
    """

    def sums(free: Params, data: EmbeddingData, part: Part, key: Key) -> tuple[jax.Array, jax.Array, dict]:
        rows, padded = data.num_queries, len(data.training.queries.heads)
        per_epoch = (rows + batch - 1) // batch
        places = (part.step % per_epoch) * batch + part.numbers
        luck = jax.random.bits(jax.random.fold_in(data.order_key, part.step // per_epoch), (padded,), jnp.uint32)
        # The order of the real rows; the padded ones come last.
        real = jnp.arange(padded, dtype=jnp.int32) < rows
        order = jnp.argsort(jnp.where(real, luck >> 1, jnp.uint32(2**32 - 1)))
        chosen = order[places % rows]
        losses = query_losses(config, assemble(free, data.frozen), data.training, chosen, part, batch, key)
        return losses.sum(), jnp.full((), part.count, losses.dtype), {}

    return make_step([LossTerm("train_loss", sums, batch)], optimiser, num_devices=num_devices)


@bounded_cache(8)
def _make_evaluate(answers: int, num_devices: int) -> Callable[[Params, EmbeddingData, Key], dict[str, jax.Array]]:
    """The filtered MRR of the validation triples; the devices share them."""
    share = -(-answers // num_devices)

    def evaluate(free: Params, data: EmbeddingData, key: Key) -> dict[str, jax.Array]:
        del key
        held_out = data.validation
        assert held_out is not None
        mine = share * jax.lax.axis_index(DEVICES) + jnp.arange(share, dtype=jnp.int32)
        chosen = jnp.minimum(mine, answers - 1)
        rows = held_out.queries, held_out.query[chosen], held_out.answer[chosen]
        ranks = query_ranks(assemble(free, data.frozen), *rows, None)
        mrr = jax.lax.psum(jnp.where(mine < answers, 1.0 / ranks, 0.0).sum(), DEVICES) / answers
        return {VALIDATION: -mrr, "validation_mrr": mrr}

    return evaluate


def query_losses(
    config: EmbeddingConfig,
    params: Params,
    training: QueryAnswers,
    rows: Int[Array, " b"],
    part: Part,
    batch: int,
    key: Key,
) -> Float[Array, " b"]:
    """Smoothed binary cross-entropy over all entities.

    Args:
      config: dropout and smoothing.
      params: all parameters.
      training: queries and their answers.
      rows: which queries; those of a part of a batch.
      part: which part.
      batch: B, queries of the whole batch.
      key: of the dropout of the whole batch.

    Returns:
      One loss per query.
    """
    head_key, query_key = jax.random.split(key)
    queries = training.queries
    heads = _dropout(params["entities"][queries.heads[rows]], config.dropout, part, batch, head_key)
    query = query_vectors(params, heads, queries.relations[rows])
    scores = _dropout(query, config.dropout, part, batch, query_key) @ params["entities"].T
    true = unpack(queries.answers[rows], scores.shape[1])
    share = (training.entities / training.entities.sum()).astype(scores.dtype)[None]
    labels = jnp.where(true, 1.0 - config.label_smoothing, 0.0).astype(scores.dtype) + config.label_smoothing * share
    return (share * (jax.nn.softplus(scores) - labels * scores)).sum(axis=1)


def _dropout(x: jax.Array, rate: float, part: Part, batch: int, key: Key) -> jax.Array:
    """Drops entries of the rows of a part of a batch, whatever the parts."""
    if not rate:
        return x
    kept = jax.random.bernoulli(key, 1.0 - rate, (batch, *x.shape[1:]))[part.numbers]
    return jnp.where(kept, x / (1.0 - rate), 0.0)
