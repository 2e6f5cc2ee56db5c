"""In: a start for every region of a target city, and the support days. Out: the starts, all moved by one update.

What a whole city has in common against its starts is seen in every region's windows, so many more readings speak for it
than for what is particular to a region.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from gpdiff_jax.data.target import Target, region_windows
from gpdiff_jax.errors import NotFiniteError
from gpdiff_jax.models.loss import huber_sums
from gpdiff_jax.models.protocol import Model
from gpdiff_jax.training import parallel
from gpdiff_jax.training.caches import bounded_cache
from gpdiff_jax.training.loop import VALIDATION, Evaluate, Step, Trained, train
from gpdiff_jax.training.memory import bytes_of, check_room
from gpdiff_jax.training.optimisers import at_rate, clipped_descent, rated_adam
from gpdiff_jax.training.parallel import DEVICES
from gpdiff_jax.training.step import LossTerm, Part, make_step, start_training
from gpdiff_jax.transfer.adapt_config import AdaptConfig
from gpdiff_jax.transfer.codes import share_of_windows, spread_windows
from gpdiff_jax.transfer.damped import target_forecast
from gpdiff_jax.typing import Key, Params
from gpdiff_jax.vectors import evenly

# Rows, each a region with one of its samples: of one step, and those that steps draw from, which lie on every device.
_ROWS, _MOST_ROWS = 32, 1024
# Of these, as many as an update is judged by; and that after every twentieth part of the steps, or after five if less.
_JUDGED_ROWS, _JUDGED_TIMES, _LONGEST_STRIDE = 64, 20, 5
# Numbers of steps whose losses differ by no more do alike (docs/experiments.md, section 45).
_ALIKE = 0.02


class _Rows(NamedTuple):
    """What every step reads."""

    target: Target
    params: Params  # initial ones, leaves [X, ...]
    regions: Int[Array, "*devices X"]  # of the rows
    starts: Int[Array, "*devices B"]  # of the windows
    trained: Float[Array, "*devices B"]  # 1 for windows that steps are taken on, else 0
    judged: Float[Array, "*devices B"]  # 1 for windows that the update is judged by, else 0


def add_to_all(params: Params, update: Params | None) -> Params:
    """Adds what `city_update` found to the parameters of every region and sample of the city.

    Args:
      params: leaves [K, R, ...].
      update: leaves [...]; None for none.

    Returns:
      Parameters, leaves [K, R, ...]; without an update the given ones.

    Raises:
      NoRoomError: the sum would not fit beside the parameters it is made of.
    """
    if update is None:
        return params
    check_tuned_room(params)
    return jax.tree.map(lambda leaf, moved: np.asarray(leaf) + moved, params, update)


def check_tuned_room(params: Params) -> None:
    """Raises `NoRoomError` where others would not fit beside these parameters of a city, leaves [K, R, ...]."""
    samples, regions = jax.tree.leaves(params)[0].shape[:2]
    check_room(bytes_of(params), f"the fine-tuned parameters of {regions} regions, {samples} of each,")


def shared_update(
    model: Model, config: AdaptConfig, target: Target, params: Params, *, key: Key, blind_params: Params | None = None
) -> tuple[Params | None, int, float | None]:
    """The update that all regions of a city share, of as many steps as the configuration says.

    Args:
      model: the forecaster.
      config: the choices.
      target: the city.
      params: what it is added to, leaves [K, R, ...].
      key: random key.
      blind_params: from where steps and rate are chosen, leaves [K, R, ...], where `params` were fitted to the support
        days.

    Returns:
      Leaves [...], to be added by `add_to_all`, or None; and the number of steps with their rate, which is None where
      there are none.

    Raises:
      NotFiniteError: a loss or its gradient is not finite.
    """
    how: Any = {
        "most_windows": config.code_windows,
        "rows_side_by_side": config.regions_per_batch,
        "key": key,
    }
    steps, rate = config.most_shared(target.bank.has_profile), config.shared_rates[-1]
    stride = _stride(steps)
    if config.shared_folds:
        start, folds = params if blind_params is None else blind_params, config.shared_folds
        steps, rate = choose_steps(model, target, start, most=steps, rates=config.shared_rates, folds=folds, **how)
    update = city_update(model, target, params, steps=steps, rate=rate, stride=stride, **how)
    return update, steps, rate if steps else None


def city_update(
    model: Model,
    target: Target,
    params: Params,
    *,
    steps: int,
    rate: float,
    most_windows: int = 128,
    rows_side_by_side: int | None = None,
    stride: int = 1,
    plain: bool = False,
    key: Key,
) -> Params | None:
    """Trains one vector on the support days of a city, to be added to the parameters of all its regions and samples.

    A step is one of `rated_adam` on the mean Huber loss of random regions on their support windows, each seen through
    the days that it does not forecast. Every region and sample is as likely, up to 1024; of more, so many are looked
    at, spread evenly. Where the support holds fewer windows than days that were read throughout, steps are shorter by
    as much, as in `codes`.

    Args:
      model: the forecaster.
      target: the city.
      params: initial ones, leaves [K, R, ...].
      steps: number of steps.
      rate: the learning rate.
      most_windows: of a region in every step, spread evenly over the support.
      rows_side_by_side: regions that a device differentiates at a time; None for what suits it.
      stride: steps of one call of a compiled program.
      plain: take steps of `clipped_descent`.
      key: random key of the regions.

    Returns:
      The vector, leaves [...]; None where the support holds no window, or there are no steps.

    Raises:
      NotFiniteError: a loss or its gradient is not finite.
    """
    starts = spread_windows(target, most_windows)
    if len(starts) == 0 or steps == 0:
        return None
    every, none = np.ones(len(starts), np.float32), np.zeros(len(starts), np.float32)
    rows = _place_rows(target, params, starts, every, none)
    length = rate * share_of_windows(target)
    how: Any = {"stride": stride, "rows_side_by_side": rows_side_by_side, "plain": plain, "key": key}
    moved = _descend(model, rows, steps=steps, rate=length, **how).params
    return jax.tree.map(np.asarray, moved)


def _stride(most: int) -> int:
    """Steps from one judgement to the next, of so many steps at most."""
    return min(max(1, -(-most // _JUDGED_TIMES)), _LONGEST_STRIDE)


def choose_steps(
    model: Model,
    target: Target,
    params: Params,
    *,
    most: int,
    rates: Sequence[float],
    folds: int = 3,
    most_windows: int = 128,
    rows_side_by_side: int | None = None,
    key: Key,
) -> tuple[int, float]:
    """How many steps of `city_update`, and at what rate, forecast support days best that they did not see.

    The days are left out in turn, in at most `folds` parts (cross-validation; Stone, "Cross-validatory choice and
    assessment of statistical predictions", 1974): steps are taken on the windows that forecast none of them, and
    after every fifth, or of few after every twentieth part, the loss is taken of at most 64 regions on the windows
    whose forecast begins on one. A rate at which a loss leaves the numbers is not taken.

    What a day left out differs by from the others is in the profile that the others are seen through, with the opposite
    sign, so steps look worse for it than they are; and starts that are made of prompts know of it what prompts tell
    (docs/experiments.md, section 43). So the most steps are taken whose loss is within 2 % of the least.

    Args:
      model: the forecaster.
      target: the city.
      params: initial ones, leaves [K, R, ...], which must not have been fitted to the support days.
      most: steps that are looked at.
      rates: learning rates that are looked at.
      folds: parts that the days are left out in.
      most_windows: of a region; see `city_update`.
      rows_side_by_side: regions that a device works on at a time.
      key: random key of the regions.

    Returns:
      Steps, 0 to `most`, and a rate. A support of one day leaves none to judge by: then 0.

    Raises:
      NotFiniteError: the loss before the first step, or its gradient, is not finite.
    """
    starts = spread_windows(target, most_windows)
    stride = _stride(most)
    counts = np.minimum(stride * np.arange(-(-most // stride) + 1), most)
    curves, rows, readings = np.zeros((len(rates), len(counts))), None, 0.0
    for trained, judged in _parts_left_out(target, starts, folds) if most else ():
        rows = _place_rows(target, params, starts, trained, judged) if rows is None else rows
        rows = rows._replace(trained=jax.device_put(trained), judged=jax.device_put(judged))
        said: list[dict[str, float]] = []
        how: Any = {"stride": stride, "rows_side_by_side": rows_side_by_side, "key": key, "judge": True}
        # The loss before the first step is that after some without length.
        before = _descend(
            model, rows, steps=stride, rate=0.0, progress=lambda _, metrics, said=said: said.append(metrics), **how
        )
        if not said[0]["readings"]:
            continue  # a part of which nothing was read says nothing
        readings += said[0]["readings"]
        for curve, rate in zip(curves, rates, strict=True):
            try:
                after = _descend(model, rows, steps=most, rate=rate * share_of_windows(target), **how).validation
            except NotFiniteError:
                after = np.full(len(counts) - 1, np.inf)
            curve += said[0]["readings"] * np.concatenate([before.validation, after])
    if not readings:
        return 0, rates[0]
    alike = curves <= (1 + _ALIKE) * curves.min()
    chosen = int(np.flatnonzero(alike.any(axis=0))[-1])
    return int(counts[chosen]), rates[int(curves[:, chosen].argmin())]


def _parts_left_out(
    target: Target, starts: Int[np.ndarray, " B"], folds: int
) -> Iterator[tuple[Float[np.ndarray, " B"], Float[np.ndarray, " B"]]]:
    """For every part of the days, the windows that forecast none of them, and those whose forecast begins on one."""
    ahead = starts + target.bank.history - int(target.support_start)
    first, last = ahead // target.steps_per_day, (ahead + target.bank.horizon - 1) // target.steps_per_day
    # What forecasts no support day only fills up the number of windows.
    days = np.unique(first[(first >= 0) & (first < target.bank.profile.shape[0] // 2)])
    parts = min(folds, len(days))
    for part in range(parts if parts > 1 else 0):
        held = days[part::parts]
        judged = np.isin(first, held)
        trained = ~judged & ~np.isin(last, held)
        if judged.any() and trained.any():
            yield trained.astype(np.float32), judged.astype(np.float32)


def _place_rows(
    target: Target,
    params: Params,
    starts: Int[np.ndarray, " B"],
    trained: Float[np.ndarray, " B"],
    judged: Float[np.ndarray, " B"],
) -> _Rows:
    """At most so many rows, spread evenly, on the default device."""
    samples = jax.tree.leaves(params)[0].shape[0]
    sample, region = np.divmod(evenly(samples * target.num_regions, _MOST_ROWS), target.num_regions)
    rows = jax.tree.map(lambda leaf: np.asarray(leaf)[sample, region], params)
    return _Rows(target.bare, *jax.device_put((rows, region.astype(np.int32), starts, trained, judged)))


def _descend(
    model: Model,
    rows: _Rows,
    *,
    steps: int,
    rate: float,
    stride: int,
    rows_side_by_side: int | None,
    key: Key,
    plain: bool = False,
    judge: bool = False,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> Trained:
    """Takes steps from an update of nothing; every stride is a call of the same program, however many there are."""
    devices = parallel.training_devices(_ROWS)
    side_by_side = parallel.rows_side_by_side(rows_side_by_side)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), rows.params)
    step, optimiser = _make_update(model, len(devices), _parts(len(devices), side_by_side), plain)
    state = start_training(nothing, optimiser)
    return train(
        step,
        state.replace(opt_state=at_rate(state.opt_state, rate)),
        rows,
        key=key,
        steps=steps,
        evaluate_every=stride,
        devices=devices,
        name="update of the city",
        evaluate=_make_judge(model, len(devices), side_by_side) if judge else None,
        progress=progress,
    )


def _parts(num_devices: int, side_by_side: int) -> int:
    """In how many parts a device works on its share of a step; one where shares differ."""
    if _ROWS % num_devices:
        return 1
    share = _ROWS // num_devices
    return next(parts for parts in range(1, share + 1) if share % parts == 0 and share // parts <= side_by_side)


def _sums(
    model: Model, data: _Rows, params: Params, regions: Int[Array, " X"], chosen: Float[Array, " B"]
) -> tuple[Float[Array, " X"], Float[Array, " X"]]:
    """Of every row the sum of the loss on the chosen windows, and the number of readings in it."""

    def of_row(params: Params, region: Int[Array, ""]) -> tuple[jax.Array, jax.Array]:
        graph, windows = region_windows(data.target, region, data.starts)
        forecast = target_forecast(model, data.target, params, graph, windows)
        return huber_sums(forecast, windows.target, windows.mask * chosen[:, None])

    return jax.vmap(of_row)(params, regions)


@bounded_cache(16)
def _make_update(model: Model, num_devices: int, parts: int, plain: bool) -> tuple[Step, optax.GradientTransformation]:
    def sums(update: Params, data: _Rows, part: Part, key: Key) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        drawn = jax.random.randint(key, (_ROWS,), 0, len(data.regions), dtype=jnp.int32)[part.numbers]
        params = jax.tree.map(lambda leaf, moved: leaf[drawn] + moved[None], data.params, update)
        totals, counts = _sums(model, data, params, data.regions[drawn], data.trained)
        return totals.sum(), counts.sum(), {}

    optimiser = clipped_descent() if plain else rated_adam()
    terms = [LossTerm("train_loss", sums, _ROWS)]
    return make_step(terms, optimiser, num_devices=num_devices, accumulate=parts), optimiser


@bounded_cache(16)
def _make_judge(model: Model, num_devices: int, side_by_side: int) -> Evaluate:
    """The loss of rows, spread evenly, on the windows that an update is judged by; the devices share them."""

    def judge(update: Params, data: _Rows, key: Key) -> dict[str, jax.Array]:
        del key
        rows = evenly(len(data.regions), _JUDGED_ROWS).astype(np.int32)
        share = -(-len(rows) // num_devices)
        mine = share * jax.lax.axis_index(DEVICES) + jnp.arange(share, dtype=jnp.int32)
        chosen = jnp.asarray(rows)[jnp.minimum(mine, len(rows) - 1)]

        def of_row(row: Int[Array, ""]) -> tuple[jax.Array, jax.Array]:
            params = jax.tree.map(lambda leaf, moved: leaf[row][None] + moved[None], data.params, update)
            totals, counts = _sums(model, data, params, data.regions[row][None], data.judged)
            return totals[0], counts[0]

        totals, counts = jax.lax.map(of_row, chosen, batch_size=side_by_side if side_by_side > 1 else None)
        counted = mine < len(rows)
        total, count = jax.lax.psum(
            (jnp.where(counted, totals, 0.0).sum(), jnp.where(counted, counts, 0.0).sum()), DEVICES
        )
        return {VALIDATION: total / jnp.maximum(count, 1.0), "readings": count}

    return judge
