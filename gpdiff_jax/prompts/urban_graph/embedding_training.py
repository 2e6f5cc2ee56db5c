"""In: triples as questions and answers, and parameters. Out: the parameters trained on them."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpdiff_jax.errors import InputError, check_above_zero, check_at_least, named
from gpdiff_jax.prompts.urban_graph.ranking import Questions, both_ways, group_questions, question_ranks, unpack
from gpdiff_jax.prompts.urban_graph.scorers import scorer
from gpdiff_jax.training.caches import bounded_cache
from gpdiff_jax.training.loop import VALIDATION, Trained, train
from gpdiff_jax.training.optimisers import clipped_adam
from gpdiff_jax.training.parallel import DEVICES, training_devices
from gpdiff_jax.training.step import LossTerm, Part, TrainState, make_step, start_training
from gpdiff_jax.typing import Device, Key, Params


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
    """Which model, how large, and how it is trained.

    TuckER, DistMult and ComplEx score all entities at once (Dettmers et al., arXiv 1707.01476): binary cross-entropy
    with `label_smoothing`, `dropout` on the head and on the query, one batch row per head and relation. TransE and
    RotatE learn from `negatives` drawn for each batch, weighted by their own scores (`temperature`) around a `margin`
    (Sun et al., arXiv 1902.10197, equation 5), one batch row per triple; known answers are never negatives.

    Training stops when `patience` evaluations on the validation triples have not raised the filtered MRR, and the best
    parameters are kept; an evaluation follows every `evaluate_every` epochs, the last one on or after `epochs`.

    Raises:
      InputError: an unknown model or a number out of its range.
    """

    model: str = "tucker"
    width: int = 128
    relation_width: int = 16  # of TuckER; the others' relations are as wide as their entities
    learning_rate: float = 3e-3
    batch: int = 128
    epochs: int = 100
    evaluate_every: int = 5
    patience: int = 4
    dropout: float = 0.3
    label_smoothing: float = 0.1
    margin: float = 9.0
    negatives: int = 128
    temperature: float = 1.0

    def __post_init__(self) -> None:
        model = scorer(self.model)
        check_at_least(
            1, named(self, "width", "relation_width", "batch", "epochs", "evaluate_every", "patience", "negatives")
        )
        check_above_zero(named(self, "learning_rate", "margin", "temperature"))
        for name in ("dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"`{name}` must be in 0..1, below 1, got {getattr(self, name)}")
        if model.halves and self.width % 2:
            raise InputError(f"`width` (={self.width}) of {self.model} must be even: its numbers are complex")


class Lessons(NamedTuple):
    """What training reads: questions with their answers, and each single answer as a row."""

    questions: Questions
    question: jax.Array  # int32 [X]
    answer: jax.Array  # int32 [X]
    entities: jax.Array  # float32 [entities], 1 for those that exist, 0 for padding


def make_lessons(
    asked: np.ndarray, known: np.ndarray, num_entities: int, num_relations: int, exist: np.ndarray | None = None
) -> Lessons:
    """Questions of triples from both sides.

    Args:
      asked: int32 [X, 3], what is to be learned.
      known: int32 [Y, 3], all triples held to be true.
      num_entities: how many can be an answer.
      num_relations: in one direction.
      exist: bool [entities], which of them are more than padding; None for all.

    Returns:
      The lessons.
    """
    rows = both_ways(asked, num_relations)
    questions, question = group_questions(rows, both_ways(known, num_relations), num_entities)
    real = np.ones(num_entities, np.float32) if exist is None else exist.astype(np.float32)
    return Lessons(questions, *jax.device_put((question.astype(np.int32), rows[:, 2], real)))


def padded_size(count: int) -> int:
    """The next of few sizes, at most a quarter larger: graphs of like size then share one compiled program."""
    step = max(16, 2 ** max(0, count.bit_length() - 3))
    return -(-count // step) * step


def pad_lessons(lessons: Lessons) -> Lessons:
    """The lessons with their rows filled up to a padded size; `train_rows` is told how many are real."""

    def fill(leaf: jax.Array) -> jax.Array:
        host = np.asarray(leaf)
        rows = padded_size(len(host)) - len(host)
        return jax.device_put(np.pad(host, [(0, rows), *((0, 0) for _ in host.shape[1:])]))

    questions, question, answer = jax.tree.map(fill, lessons[:3])
    return lessons._replace(questions=questions, question=question, answer=answer)


def assemble(free: Params, frozen: Params) -> Params:
    """All parameters: the free ones alone, or new rows of entities below the frozen ones."""
    if not frozen:
        return free
    return {**frozen, "entities": jnp.concatenate([frozen["entities"], free["entities"]])}


class EmbeddingData(NamedTuple):
    """What every step of training an embedding reads."""

    frozen: Params  # of a trained embedding, whose entities stay; empty where all is free
    lessons: Lessons
    exam: Lessons | None
    order_key: Key  # of the order in which an epoch takes its rows
    num_rows: jax.Array  # int32 [], rows of the lessons that are more than padding


def train_rows(
    config: EmbeddingConfig,
    free: Params,
    frozen: Params,
    lessons: Lessons,
    exam: Lessons | None,
    *,
    key: Key,
    devices: Sequence[Device] | None = None,
    checkpoints: pathlib.Path | None = None,
    real_rows: int | None = None,
    steps_at_once: int | None = None,
) -> Trained:
    """Trains parameters on lessons.

    Args:
      config: the model and its training.
      free: the parameters to train.
      frozen: those that stay as they are; see `assemble`.
      lessons: to learn from.
      exam: held-out triples for early stopping; None trains all epochs.
      key: random key.
      devices: see `parallel.training_devices`; they share the rows of a batch.
      checkpoints: see `loop.train`.
      real_rows: of padded lessons, how many rows are real; None for all.
      steps_at_once: steps of one call of one program, of which there are whole ones; a program then fits any number of
        epochs. None for those from one evaluation to the next, or of as many epochs where nothing is evaluated.

    Returns:
      The free parameters with the best filtered MRR; the validation losses are MRR with a minus.

    Raises:
      NotFiniteError: a loss or its gradient is not finite; names the step.
    """
    rows = num_rows(config, lessons) if real_rows is None else real_rows
    batch = min(config.batch, num_rows(config, lessons))
    per_epoch, devices = -(-rows // batch), training_devices(batch, devices)
    every = 1 if exam is None else config.evaluate_every
    optimiser = _optimiser(config.learning_rate)
    train_key, order_key = jax.random.split(key)
    steps, at_once = -(-config.epochs // every) * every * per_epoch, config.evaluate_every * per_epoch
    if steps_at_once is not None:
        steps, at_once = -(-steps // steps_at_once) * steps_at_once, steps_at_once
    return train(
        make_embedding_step(optimiser, dataclasses.replace(config, epochs=1), batch, len(devices)),
        start_training(free, optimiser),
        EmbeddingData(frozen, lessons, exam, order_key, jax.device_put(np.int32(rows))),
        key=train_key,
        steps=steps,
        evaluate_every=at_once,
        devices=devices,
        name="knowledge-graph embedding",
        evaluate=None
        if exam is None
        else _make_evaluate(dataclasses.replace(config, epochs=1), len(exam.answer), len(devices)),
        patience=config.patience,
        checkpoints=checkpoints,
        settings=config,
    )


@bounded_cache(32)
def _optimiser(learning_rate: float) -> optax.GradientTransformation:
    """One object for one rate: what was compiled for it is found again."""
    return clipped_adam(learning_rate)


def num_rows(config: EmbeddingConfig, lessons: Lessons) -> int:
    """Rows that an epoch goes through: questions where a model scores all entities, else single answers."""
    return len(lessons.questions.heads) if scorer(config.model).scores_all else len(lessons.answer)


@bounded_cache(8)
def make_embedding_step(
    optimiser: optax.GradientTransformation, config: EmbeddingConfig, batch: int, num_devices: int
) -> Callable[[TrainState, EmbeddingData, Key], tuple[TrainState, dict[str, jax.Array]]]:
    """One step of training an embedding, for `loop.train`; every epoch takes the rows in an order of its own.

    Nothing of one graph is in it, so that another of the same padded size finds it compiled.

    Args:
      optimiser: of the free parameters.
      config: the model; its number of epochs plays no part.
      batch: B, rows of a step: questions where a model scores all entities, else single answers. The last batch of an
        epoch is filled up from its first rows.
      num_devices: D.

    Returns:
      See `step.make_step`.
    """
    losses_of = _all_entities_losses if scorer(config.model).scores_all else _negatives_losses

    def sums(free: Params, data: EmbeddingData, part: Part, key: Key) -> tuple[jax.Array, jax.Array, dict]:
        rows, padded = data.num_rows, num_rows(config, data.lessons)
        per_epoch = (rows + batch - 1) // batch
        places = (part.step % per_epoch) * batch + part.numbers
        luck = jax.random.bits(jax.random.fold_in(data.order_key, part.step // per_epoch), (padded,), jnp.uint32)
        # The order of the real rows; the padded ones come last.
        real = jnp.arange(padded, dtype=jnp.int32) < rows
        order = jnp.argsort(jnp.where(real, luck >> 1, jnp.uint32(2**32 - 1)))
        chosen = order[places % rows]
        losses = losses_of(config, assemble(free, data.frozen), data.lessons, chosen, part, batch, key)
        return losses.sum(), jnp.full((), part.count, losses.dtype), {}

    return make_step([LossTerm("train_loss", sums, batch)], optimiser, num_devices=num_devices)


@bounded_cache(8)
def _make_evaluate(
    config: EmbeddingConfig, answers: int, num_devices: int
) -> Callable[[Params, EmbeddingData, Key], dict[str, jax.Array]]:
    """The filtered MRR of the exam; the devices share its answers."""
    share = -(-answers // num_devices)

    def evaluate(free: Params, data: EmbeddingData, key: Key) -> dict[str, jax.Array]:
        del key
        exam = data.exam
        assert exam is not None
        mine = share * jax.lax.axis_index(DEVICES) + jnp.arange(share, dtype=jnp.int32)
        chosen = jnp.minimum(mine, answers - 1)
        asked = exam.questions, exam.question[chosen], exam.answer[chosen]
        ranks = question_ranks(config.model, assemble(free, data.frozen), config.margin, *asked, None)
        mrr = jax.lax.psum(jnp.where(mine < answers, 1.0 / ranks, 0.0).sum(), DEVICES) / answers
        return {VALIDATION: -mrr, "validation_mrr": mrr}

    return evaluate


def _all_entities_losses(
    config: EmbeddingConfig, params: Params, lessons: Lessons, rows: jax.Array, part: Part, batch: int, key: Key
) -> jax.Array:
    """Smoothed binary cross-entropy over all entities, of questions."""
    model, (head_key, query_key) = scorer(config.model), jax.random.split(key)
    questions = lessons.questions
    heads = _dropout(params["entities"][questions.heads[rows]], config.dropout, part, batch, head_key)
    query = model.query(params, heads, questions.relations[rows])
    scores = model.compare(_dropout(query, config.dropout, part, batch, query_key), params["entities"], config.margin)
    true = unpack(questions.answers[rows], scores.shape[1])
    share = (lessons.entities / lessons.entities.sum()).astype(scores.dtype)[None]
    labels = jnp.where(true, 1.0 - config.label_smoothing, 0.0).astype(scores.dtype) + config.label_smoothing * share
    return (share * (jax.nn.softplus(scores) - labels * scores)).sum(axis=1)


def _negatives_losses(
    config: EmbeddingConfig, params: Params, lessons: Lessons, rows: jax.Array, part: Part, batch: int, key: Key
) -> jax.Array:
    """Self-adversarial losses, of single answers."""
    del part, batch
    model, questions = scorer(config.model), lessons.questions
    asked, answer = lessons.question[rows], lessons.answer[rows]
    entities = params["entities"]
    query = model.query(params, entities[questions.heads[asked]], questions.relations[asked])
    drawn = jnp.arange(entities.shape[0], dtype=jnp.int32)
    if config.negatives < entities.shape[0]:
        drawn = jax.random.categorical(key, jnp.log(lessons.entities), shape=(config.negatives,)).astype(jnp.int32)
    negative = model.compare(query, entities[drawn], config.margin)
    # What is no entity is no negative, as what is true is none.
    true = unpack(questions.answers[asked], entities.shape[0])[:, drawn] | (lessons.entities[drawn] == 0)[None]
    positive = jax.vmap(lambda q, e: model.compare(q[None], e[None], config.margin)[0, 0])(query, entities[answer])
    logits = jnp.where(true, -1e9, config.temperature * negative)
    weight = jax.lax.stop_gradient(jnp.where(true, 0.0, jax.nn.softmax(logits, axis=1)))
    return 0.5 * (jax.nn.softplus(-positive) + (weight * jax.nn.softplus(negative)).sum(axis=1))


def _dropout(x: jax.Array, rate: float, part: Part, batch: int, key: Key) -> jax.Array:
    """Drops entries of the rows of a part of a batch, whatever the parts."""
    if not rate:
        return x
    kept = jax.random.bernoulli(key, 1.0 - rate, (batch, *x.shape[1:]))[part.numbers]
    return jnp.where(kept, x / (1.0 - rate), 0.0)
