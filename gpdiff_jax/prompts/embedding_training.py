"""In: triples as questions and answers, and parameters. Out: the parameters trained on them."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpdiff_jax.errors import InputError
from gpdiff_jax.optimisers import clipped_adam
from gpdiff_jax.parallel import DEVICES, training_devices
from gpdiff_jax.prompts.ranking import Questions, both_ways, group_questions, question_ranks, unpack
from gpdiff_jax.prompts.scorers import scorer
from gpdiff_jax.training.loop import VALIDATION, Trained, train
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
        for name in ("width", "relation_width", "batch", "epochs", "evaluate_every", "patience", "negatives"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "margin", "temperature"):
            if not getattr(self, name) > 0:
                raise InputError(f"`{name}` must be above 0, got {getattr(self, name)}")
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


def make_lessons(asked: np.ndarray, known: np.ndarray, num_entities: int, num_relations: int) -> Lessons:
    """Questions of triples from both sides; `known` holds all their true answers."""
    rows = both_ways(asked, num_relations)
    questions, question = group_questions(rows, both_ways(known, num_relations), num_entities)
    return Lessons(questions, *jax.device_put((question.astype(np.int32), rows[:, 2])))


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

    Returns:
      The free parameters with the best filtered MRR; the validation losses are MRR with a minus.

    Raises:
      NotFiniteError: a loss or its gradient is not finite; names the step.
    """
    rows = _num_rows(config, lessons)
    batch = min(config.batch, rows)
    per_epoch, devices = -(-rows // batch), training_devices(batch, devices)
    every = 1 if exam is None else config.evaluate_every
    optimiser = clipped_adam(config.learning_rate)
    train_key, order_key = jax.random.split(key)
    steps = -(-config.epochs // every) * every * per_epoch
    return train(
        make_embedding_step(optimiser, config, batch, rows, len(devices)),
        start_training(free, optimiser),
        EmbeddingData(frozen, lessons, exam, order_key),
        key=train_key,
        steps=steps,
        evaluate_every=steps if exam is None else every * per_epoch,
        devices=devices,
        name="knowledge-graph embedding",
        evaluate=None if exam is None else _make_evaluate(config, len(exam.answer), len(devices)),
        patience=config.patience,
        checkpoints=checkpoints,
    )


def _num_rows(config: EmbeddingConfig, lessons: Lessons) -> int:
    return len(lessons.questions.heads) if scorer(config.model).scores_all else len(lessons.answer)


def make_embedding_step(
    optimiser: optax.GradientTransformation, config: EmbeddingConfig, batch: int, rows: int, num_devices: int
) -> Callable[[TrainState, EmbeddingData, Key], tuple[TrainState, dict[str, jax.Array]]]:
    """One step of training an embedding, for `loop.train`; every epoch takes the rows in an order of its own.

    Args:
      optimiser: of the free parameters.
      config: the model.
      batch: B, rows of a step: questions where a model scores all entities, else single answers.
      rows: how many there are; the last batch of an epoch is filled up from its first rows.
      num_devices: D.

    Returns:
      See `step.make_step`.
    """
    per_epoch = -(-rows // batch)
    losses_of = _all_entities_losses if scorer(config.model).scores_all else _negatives_losses

    def sums(free: Params, data: EmbeddingData, part: Part, key: Key) -> tuple[jax.Array, jax.Array, dict]:
        order = jax.random.permutation(jax.random.fold_in(data.order_key, part.step // per_epoch), rows)
        places = (part.step % per_epoch) * batch + part.numbers
        chosen = order[places % rows]
        losses = losses_of(config, assemble(free, data.frozen), data.lessons, chosen, part, batch, key)
        return losses.sum(), jnp.full((), part.count, losses.dtype), {}

    return make_step([LossTerm("train_loss", sums, batch)], optimiser, num_devices=num_devices)


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
    labels = jnp.where(true, 1.0 - config.label_smoothing, 0.0) + config.label_smoothing / scores.shape[1]
    return (jax.nn.softplus(scores) - labels.astype(scores.dtype) * scores).mean(axis=1)


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
        drawn = jax.random.randint(key, (config.negatives,), 0, entities.shape[0], jnp.int32)
    negative = model.compare(query, entities[drawn], config.margin)
    true = unpack(questions.answers[asked], entities.shape[0])[:, drawn]
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
