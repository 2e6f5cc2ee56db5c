"""In: a start for every region of a target city, and its support days. Out: fine-tuned parameters.

Every method is tuned alike. In codes, every region takes the same few steps along the directions of the zoo (`codes`);
else each tunes all its weights, with learning rate and number of steps that are chosen on the validation day by one
rule. Rows are spread over all local devices.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from gpdiff_jax.data.target import Target, region_windows
from gpdiff_jax.errors import InputError
from gpdiff_jax.models.loss import masked_huber
from gpdiff_jax.models.protocol import Model, Window
from gpdiff_jax.training.caches import bounded_cache
from gpdiff_jax.training.optimisers import clipped_adam
from gpdiff_jax.training.parallel import ShardedRows, rows_side_by_side
from gpdiff_jax.transfer.adapt_config import AdaptConfig
from gpdiff_jax.transfer.codes import move_along_directions
from gpdiff_jax.transfer.damped import in_data_units, on_seen_kinds, target_forecast
from gpdiff_jax.transfer.shared import add_to_all, check_tuned_room, shared_update
from gpdiff_jax.typing import Key, Params, RegionGraph


class Adapted(NamedTuple):
    """Fine-tuned parameters of all regions, and how they were chosen."""

    params: Params  # [K, R, ...]
    learning_rate: float | None  # None where there was no window to adapt on
    steps: int
    validation_mae: float | None  # of the city, data units
    curves: np.ndarray  # [rates, evaluations + 1], validation error of the city, data units
    shared_steps: int | None = None  # that the city shares, and their rate; None where it shares none
    shared_rate: float | None = None


def _scaled_floor(target: Target, graph: RegionGraph) -> jax.Array:
    """The least forecast of a region, in its scale."""
    node = graph.nodes[0]
    return (target.floor - target.bank.mean[-1, node]) / target.bank.std[-1, node]


def _make_update(
    model: Model, target: Target, graph: RegionGraph, windows: Window, rate: jax.Array, batch: int, key: Key
) -> tuple[Callable[[jax.Array, tuple], tuple], Callable[[Params], optax.OptState]]:
    optimiser = clipped_adam(rate)
    count = windows.mask.shape[0]

    def loss_fn(params: Params, step: jax.Array) -> jax.Array:
        seen = windows
        if count > batch:
            rows = jax.random.choice(jax.random.fold_in(key, step), count, (batch,), replace=False)
            seen = jax.tree.map(lambda leaf: leaf[rows], windows)
        return masked_huber(target_forecast(model, target, params, graph, seen), seen.target, seen.mask)

    def update(step: jax.Array, carry: tuple) -> tuple:
        params, opt_state = carry
        updates, opt_state = optimiser.update(jax.grad(loss_fn)(params, step), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return update, optimiser.init


def trace_validation(
    model: Model, config: AdaptConfig, eve: Target, params: Params, rate: float, *, key: Key
) -> tuple[Float[np.ndarray, "R evaluations"], Float[np.ndarray, " R"]]:
    """Fine-tunes on the adaptation days and watches the error of the samples' mean forecast on the validation day.

    Args:
      model: the forecaster.
      config: steps and sizes.
      eve: `Target.choice`, the city on the eve of its validation days, which are its test windows.
      params: initial ones, leaves [K, R, ...].
      rate: learning rate.
      key: random key.

    Returns:
      Sums of absolute validation errors (data units) before the first step and after every `evaluate_every`, and the
      number of observed readings that went into each sum.
    """
    # Compiled programs are found by what they depend on, which the other choices are not.
    sizes = (config.steps, config.evaluate_every, config.batch, rows_side_by_side(config.regions_per_batch))
    rows = _by_region(params), np.arange(eve.num_regions, dtype=np.int32)
    return ShardedRows(_make_trace(model, *sizes), (eve, key, np.float32(rate))).map(rows)


def _by_region(params: Params) -> Params:
    """Leaves [K, R, ...] as [R, K, ...], on the host."""
    return jax.tree.map(lambda leaf: np.swapaxes(np.asarray(leaf), 0, 1), params)


@bounded_cache(16)
def _make_trace(
    model: Model, steps: int, evaluate_every: int, batch: int, regions_per_batch: int
) -> Callable[[tuple, tuple], tuple]:
    def trace(shared: tuple, row: tuple) -> tuple[jax.Array, jax.Array]:
        (eve, key, rate), (samples, region) = shared, row
        graph, windows = region_windows(eve, region, eve.adaptation_starts)
        _, held_out = region_windows(eve, region, eve.test_starts)
        own_key = jax.random.fold_in(key, eve.region_ids[region])
        update, init = _make_update(model, eve, graph, windows, rate, batch, own_key)

        def forecast(params: Params) -> jax.Array:
            return jnp.maximum(target_forecast(model, eve, params, graph, held_out), _scaled_floor(eve, graph))

        def forecasts_of(initial: Params) -> Float[Array, "evaluations S P"]:
            def advance(carry: tuple, step: jax.Array) -> tuple[tuple, jax.Array]:
                carry = jax.lax.fori_loop(step, jnp.minimum(step + evaluate_every, steps), update, carry)
                return carry, forecast(carry[0])

            _, later = jax.lax.scan(advance, (initial, init(initial)), jnp.arange(0, steps, evaluate_every))
            return jnp.concatenate([forecast(initial)[None], later])

        # What counts is the error of what is reported: the mean of the samples' forecasts.
        together = jax.tree.leaves(samples)[0].shape[0] if regions_per_batch > 1 else None
        mean = jax.lax.map(forecasts_of, samples, batch_size=together).mean(axis=0)
        absolute = (jnp.abs(mean - held_out.target[None]) * held_out.mask[None]).sum(axis=(1, 2))
        return absolute * eve.bank.std[-1, graph.nodes[0]], held_out.mask.sum()

    return _over_rows(trace, regions_per_batch)


def fine_tune(
    model: Model,
    config: AdaptConfig,
    target: Target,
    params: Params,
    regions: Int[Array | np.ndarray, " X"],
    starts: Int[Array, " B"],
    rate: float,
    steps: int,
    *,
    key: Key,
) -> Params:
    """Fine-tunes rows for a given number of steps.

    Args:
      model: the forecaster.
      config: sizes.
      target: the city.
      params: initial ones, leaves [X, ...].
      regions: [X], the region of every row.
      starts: of the windows to train on.
      rate: learning rate.
      steps: number of steps.
      key: random key.

    Returns:
      Parameters, leaves [X, ...]. A region without a visible reading keeps its parameters.
    """
    shared = (target.bare, key, np.float32(rate), np.int32(steps), starts)
    tune = _make_tune(model, config.batch, rows_side_by_side(config.regions_per_batch))
    return ShardedRows(tune, shared).map((params, regions))


@bounded_cache(16)
def _make_tune(model: Model, batch: int, regions_per_batch: int) -> Callable[[tuple, tuple], Params]:
    def tune(shared: tuple, row: tuple) -> Params:
        (target, key, rate, steps, starts), (initial, region) = shared, row
        graph, windows = region_windows(target, region, starts)
        own_key = jax.random.fold_in(key, target.region_ids[region])
        update, init = _make_update(model, target, graph, windows, rate, batch, own_key)
        return jax.lax.fori_loop(0, steps, update, (initial, init(initial)))[0]

    return _over_rows(tune, regions_per_batch)


def forecast_rows(
    model: Model,
    target: Target,
    params: Params,
    regions: Int[Array | np.ndarray, " X"],
    starts: Int[Array, " S"],
    initial: Params | None = None,
) -> Float[np.ndarray, "X S P"]:
    """Forecasts of every row for the given windows, in data units; none below the target's floor.

    Args:
      model: the forecaster.
      target: the city.
      params: of every row, leaves [X, ...].
      regions: of every row.
      starts: of the windows.
      initial: what `params` were before they were fine-tuned, where these are to forecast the kinds of day that the
        support lacks; see `damped.on_seen_kinds`.

    Returns:
      float32.
    """
    shared = (target.bare, starts)
    return ShardedRows(_make_forecast(model), shared).map((params, initial, regions))


@bounded_cache(16)
def _make_forecast(model: Model) -> Callable[[tuple, tuple], jax.Array]:
    def forecast(shared: tuple, row: tuple) -> jax.Array:
        (target, starts), (params, initial, region) = shared, row
        graph, windows = region_windows(target, region, starts)
        scaled = target_forecast(model, target, params, graph, windows)
        if initial is not None:
            before = target_forecast(model, target, initial, graph, windows)
            scaled = on_seen_kinds(target, scaled, before, windows)
        return in_data_units(target, graph.nodes[0], scaled)

    return _over_rows(forecast, 1)


def _over_rows(one: Callable[[tuple, tuple], Any], batch: int) -> Callable[[tuple, tuple], Any]:
    """The function of one row, as a function of many."""
    # A batch of one would still be a batch, with batched products, which are slower.
    batch_size = batch if batch > 1 else None
    return lambda shared, rows: jax.lax.map(functools.partial(one, shared), rows, batch_size=batch_size)


def choose_adaptation(
    error_sums: Float[np.ndarray, "rates R evaluations"], count: Float[np.ndarray, " R"], config: AdaptConfig
) -> tuple[Float[np.ndarray, "rates evaluations"], int, int]:
    """Chooses the least fine-tuning that the validation day cannot tell from the best.

    A validation day says nothing of days unlike it (a weekend, say), and every step may spoil what the start knew of
    them. So the one-standard-error rule holds (Breiman et al., "Classification and Regression Trees", 1984, 3.4.3):
    of all choices whose error is within one standard error of the lowest, the one that goes least far from the start,
    that is with the smallest learning rate x steps.

    Args:
      error_sums: sums of absolute errors of every region before the first step and at every evaluation, by rate.
      count: observed readings behind each region's sums.
      config: the choices.

    Returns:
      The city's mean error [rates, evaluations], and the indices of the chosen rate and evaluation.
    """
    seen = count > 0
    total = max(count.sum(), 1.0)
    curves = error_sums.sum(axis=1) / total
    curves = np.where(np.isfinite(curves), curves, np.inf)
    best_rate, best_evaluation = np.unravel_index(np.argmin(curves), curves.shape)
    # The mean is a ratio of sums over regions; its standard error by linearisation.
    residual = error_sums[best_rate, seen, best_evaluation] - curves[best_rate, best_evaluation] * count[seen]
    standard_error = np.sqrt(np.square(residual).sum()) / total
    travelled = np.outer(config.learning_rates, np.arange(curves.shape[1]))
    eligible = curves <= curves.min() + (standard_error if config.one_standard_error else 0.0)
    # Equal ways from the start (zero steps at any rate) go to the lower error.
    order = np.lexsort((curves.ravel(), np.where(eligible, travelled, np.inf).ravel()))
    rate, evaluation = np.unravel_index(order[0], curves.shape)
    return curves, int(rate), int(evaluation)


def check_directions(config: AdaptConfig, directions: Params | None) -> None:
    """Raises `InputError` where steps in codes are asked for and there are no directions to take them along."""
    if config.update == "codes" and directions is None:
        raise InputError("steps in codes need the directions of a zoo; without them take `update='shared'`, or 'own'")


def adapt_together(
    model: Model,
    config: AdaptConfig,
    target: Target,
    params: Params,
    *,
    key: Key,
    directions: Params | None = None,
    blind_params: Params | None = None,
) -> Adapted:
    """Fine-tunes by the update that the city shares, and with "codes" by steps of every region in codes after it.

    Args:
      model: the forecaster.
      config: the choices; `update` is "shared" or "codes".
      target: the city.
      params: initial parameters, leaves [K, R, ...].
      key: random key.
      directions: of the zoo, leaves [n, ...], which steps in codes need.
      blind_params: see `shared_update`.

    Returns:
      The fine-tuned parameters; the given ones, where the support holds no window.

    Raises:
      InputError: there are no directions to update in codes.
      NotFiniteError: a loss of the shared steps or of those in codes, or its gradient, is not finite.
      NoRoomError: the fine-tuned parameters would not fit beside the initial ones.
    """
    check_directions(config, directions)
    no_curves = np.zeros((0, 0))
    if len(target.support_starts) == 0:
        return Adapted(params, None, 0, None, no_curves)
    check_tuned_room(params)
    update, steps, rate = shared_update(model, config, target, params, key=key, blind_params=blind_params)
    if config.update == "shared":
        return Adapted(add_to_all(params, update), rate, steps, None, no_curves, steps, rate)
    moves = config.code_moves(target.bank.has_profile)
    moved = move_along_directions(
        model,
        target,
        params,
        jax.tree.map(lambda leaf: leaf[: config.directions], directions),
        **moves._asdict(),
        most_windows=config.code_windows,
        rows_side_by_side=rows_side_by_side(config.regions_per_batch),
        update=update,
    )
    return Adapted(moved, moves.rate, moves.steps, None, no_curves, steps, rate)


def adapt(
    model: Model,
    config: AdaptConfig,
    target: Target,
    params: Params,
    *,
    key: Key,
    directions: Params | None = None,
    choice_params: Params | None = None,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> Adapted:
    """Fine-tunes the regions, as the configuration says.

    Args:
      model: the forecaster.
      config: the choices.
      target: the city.
      params: initial ones, leaves [K, R, ...].
      key: random key.
      directions: of the zoo, leaves [n, ...], which updates in codes need; see `zoo.directions`.
      choice_params: where all weights are tuned, initial parameters of the choice of rate and steps, leaves
        [K, R, ...], made as `params` but of the adaptation days alone: what is chosen on the validation day must not
        know it. None where `params` know nothing of the support days.
      progress: called with (learning rates tried, metrics).

    Returns:
      The fine-tuned parameters. Where rate and steps are chosen, zero steps are among the choices. A single support
      day leaves nothing to choose by: then no steps are shared, and where all weights are tuned, they come back as
      they were.

    Raises:
      InputError: there are no directions to update in codes.
      NotFiniteError: a loss of the steps that the city shares or of those in codes, or its gradient, is not finite.
      NoRoomError: the fine-tuned parameters would not fit beside the initial ones.
    """
    samples = jax.tree.leaves(params)[0].shape[0]
    if config.update in ("shared", "codes"):
        return adapt_together(model, config, target, params, key=key, directions=directions)

    def tune(starts: Int[Array, " B"], rate: float, steps: int) -> Params:
        check_tuned_room(params)
        rows = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[2:]), params)
        regions = np.tile(np.arange(target.num_regions, dtype=np.int32), samples)
        tuned = fine_tune(model, config, target, rows, regions, starts, rate, steps, key=key)
        return jax.tree.map(lambda leaf: leaf.reshape(samples, -1, *leaf.shape[1:]), tuned)

    if target.choice is None:
        if config.blind_learning_rate is None or len(target.support_starts) == 0:
            return Adapted(params, None, 0, None, np.zeros((0, 0)))
        tuned = tune(target.support_starts, config.blind_learning_rate, config.steps)
        return Adapted(tuned, config.blind_learning_rate, config.steps, None, np.zeros((0, 0)))
    sums, count = [], np.zeros(target.num_regions)
    for done, rate in enumerate(config.learning_rates, 1):
        initial = params if choice_params is None else choice_params
        sums_of_rate, count = trace_validation(model, config, target.choice, initial, rate, key=key)
        sums.append(np.asarray(sums_of_rate, np.float64))
        if progress:
            city_mae = sums[-1].sum(axis=0) / max(count.sum(), 1.0)
            progress(done, {"learning_rate": rate, "validation_loss": float(city_mae.min())})
    curves, best_rate, best_evaluation = choose_adaptation(np.stack(sums), np.asarray(count, np.float64), config)
    rate, steps = config.learning_rates[best_rate], min(best_evaluation * config.evaluate_every, config.steps)
    tuned = tune(target.support_starts if config.refit else target.adaptation_starts, rate, steps)
    return Adapted(tuned, rate, steps, float(curves[best_rate, best_evaluation]), curves)
