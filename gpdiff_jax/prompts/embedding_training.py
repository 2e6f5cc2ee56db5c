"""In: triples as questions and answers, and parameters. Out: the parameters trained on them, in one compiled loop."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpdiff_jax.errors import InputError
from gpdiff_jax.optimisers import clipped_adam
from gpdiff_jax.prompts.ranking import Questions, both_ways, group_questions, question_ranks, unpack
from gpdiff_jax.prompts.scorers import scorer
from gpdiff_jax.typing import Key, Params


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


def _all_entities_loss(config: EmbeddingConfig, params: Params, lessons: Lessons, rows: jax.Array, key: Key):
    """Smoothed binary cross-entropy over all entities; a row is a question."""
    model, (head_key, query_key) = scorer(config.model), jax.random.split(key)
    questions = lessons.questions
    heads = _dropout(params["entities"][questions.heads[rows]], config.dropout, head_key)
    query = _dropout(model.query(params, heads, questions.relations[rows]), config.dropout, query_key)
    scores = model.compare(query, params["entities"], config.margin)
    true = unpack(questions.answers[rows], scores.shape[1])
    labels = jnp.where(true, 1.0 - config.label_smoothing, 0.0) + config.label_smoothing / scores.shape[1]
    return (jax.nn.softplus(scores) - labels * scores).mean()


def _negatives_loss(config: EmbeddingConfig, params: Params, lessons: Lessons, rows: jax.Array, key: Key):
    """Self-adversarial loss; a row is one answer."""
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
    return 0.5 * (jax.nn.softplus(-positive) + (weight * jax.nn.softplus(negative)).sum(axis=1)).mean()


def _dropout(x: jax.Array, rate: float, key: Key) -> jax.Array:
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0.0) if rate else x


class _Progress(NamedTuple):
    """What the loop over evaluations carries."""

    free: Params
    state: Any
    best: Params
    best_mrr: jax.Array
    since_best: jax.Array
    history: jax.Array


def _run(
    config: EmbeddingConfig, free: Params, frozen: Params, lessons: Lessons, exam: Lessons | None, key: Key
) -> tuple[Params, jax.Array]:
    """Trains to the end in one compiled loop; returns the best free parameters and the MRR of every evaluation."""
    loss_of = _all_entities_loss if scorer(config.model).scores_all else _negatives_loss
    count = len(lessons.questions.heads) if scorer(config.model).scores_all else len(lessons.answer)
    batch = min(config.batch, count)
    steps = -(-count // batch)
    optimiser = clipped_adam(config.learning_rate)
    every = 1 if exam is None else config.evaluate_every
    rounds = -(-config.epochs // every)

    def step(carry: tuple, inputs: tuple) -> tuple[tuple, None]:
        (free, state), (rows, step_key) = carry, inputs
        grads = jax.grad(lambda free: loss_of(config, assemble(free, frozen), lessons, rows, step_key))(free)
        updates, state = optimiser.update(grads, state, free)
        return (jax.tree.map(jnp.add, free, updates), state), None

    def epoch(carry: tuple, epoch_key: Key) -> tuple[tuple, None]:
        order_key, steps_key = jax.random.split(epoch_key)
        order = jax.random.permutation(order_key, count)
        # The last batch is filled up from the beginning, so that all are equally long.
        rows = order[jnp.arange(steps * batch) % count].reshape(steps, batch)
        return jax.lax.scan(step, carry, (rows, jax.random.split(steps_key, steps)))

    def evaluation(index: jax.Array, progress: _Progress) -> _Progress:
        keys = jax.random.split(jax.random.fold_in(key, index), every)
        (free, state), _ = jax.lax.scan(epoch, (progress.free, progress.state), keys)
        if exam is None:
            return progress._replace(free=free, state=state, best=free)
        params, questions = assemble(free, frozen), exam.questions
        ranks = question_ranks(config.model, params, config.margin, questions, exam.question, exam.answer, None)
        mrr = (1.0 / ranks).mean()
        better = mrr > progress.best_mrr
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), free, progress.best)
        since = jnp.where(better, 0, progress.since_best + 1)
        best_mrr = jnp.maximum(mrr, progress.best_mrr)
        return _Progress(free, state, best, best_mrr, since, progress.history.at[index].set(mrr))

    start = _Progress(
        free, optimiser.init(free), free, jnp.float32(-1.0), jnp.int32(0), jnp.full((rounds,), jnp.nan, jnp.float32)
    )
    _, progress = jax.lax.while_loop(
        lambda carry: (carry[0] < rounds) & (carry[1].since_best < config.patience),
        lambda carry: (carry[0] + 1, evaluation(*carry)),
        (jnp.int32(0), start),
    )
    return progress.best, progress.history


train_rows = jax.jit(_run, static_argnums=0)
