"""In: a start for every region of a target city, and the support days. Out: the starts, all moved by one update.

What a whole city has in common against its starts is seen in every region's windows, so many more readings speak for it
than for what is particular to a region.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from gpdiff_jax.data.target import Target, region_windows
from gpdiff_jax.models.loss import huber_sums
from gpdiff_jax.models.protocol import Model
from gpdiff_jax.training import parallel
from gpdiff_jax.training.caches import bounded_cache
from gpdiff_jax.training.loop import Step, train
from gpdiff_jax.training.memory import bytes_of, check_room
from gpdiff_jax.training.optimisers import at_rate, clipped_descent
from gpdiff_jax.training.step import LossTerm, Part, make_step, start_training
from gpdiff_jax.transfer.codes import share_of_windows, spread_windows
from gpdiff_jax.transfer.damped import target_forecast
from gpdiff_jax.typing import Key, Params
from gpdiff_jax.vectors import evenly

# Rows, each a region with one of its samples: of one step, and those that steps draw from, which lie on every device.
_ROWS, _MOST_ROWS = 32, 1024


class _Rows(NamedTuple):
    """What every step reads."""

    target: Target
    params: Params  # initial ones, leaves [X, ...]
    regions: Int[Array, "*devices X"]  # of the rows
    starts: Int[Array, "*devices B"]  # of the windows


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


def city_update(
    model: Model,
    target: Target,
    params: Params,
    *,
    steps: int,
    rate: float,
    most_windows: int = 128,
    rows_side_by_side: int | None = None,
    key: Key,
) -> Params | None:
    """Trains one vector on the support days of a city, to be added to the parameters of all its regions and samples.

    A step is one of gradient descent, its gradient clipped to a length of 1, on the mean Huber loss of random regions
    on their support windows, each seen through the days that it does not forecast. Every region and sample is as
    likely, up to 1024; of more, so many are looked at, spread evenly. Where the support holds fewer windows than
    days that were read throughout, steps are shorter by as much, as in `codes`.

    Args:
      model: the forecaster.
      target: the city.
      params: initial ones, leaves [K, R, ...].
      steps: number of steps.
      rate: length of a step, of a gradient of length 1.
      most_windows: of a region in every step, spread evenly over the support.
      rows_side_by_side: regions that a device differentiates at a time; None for what suits it.
      key: random key of the regions.

    Returns:
      The vector, leaves [...]; None where the support holds no window, or there are no steps.

    Raises:
      NotFiniteError: a loss or its gradient is not finite.
    """
    starts = spread_windows(target, most_windows)
    if len(starts) == 0 or steps == 0:
        return None
    samples = jax.tree.leaves(params)[0].shape[0]
    chosen = evenly(samples * target.num_regions, _MOST_ROWS)
    sample, region = np.divmod(chosen, target.num_regions)
    rows = jax.tree.map(lambda leaf: np.asarray(leaf)[sample, region], params)
    devices = parallel.training_devices(_ROWS)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), rows)
    parts = _parts(len(devices), parallel.rows_side_by_side(rows_side_by_side))
    step, optimiser = _make_update(model, len(devices), parts)
    state = start_training(nothing, optimiser)
    moved = train(
        step,
        state.replace(opt_state=at_rate(state.opt_state, rate * share_of_windows(target))),
        _Rows(target.bare, *jax.device_put((rows, region.astype(np.int32), starts))),
        key=key,
        steps=steps,
        evaluate_every=steps,
        devices=devices,
        name="update of the city",
    ).params
    return jax.tree.map(np.asarray, moved)


def _parts(num_devices: int, side_by_side: int) -> int:
    """In how many parts a device works on its share of a step; one where shares differ."""
    if _ROWS % num_devices:
        return 1
    share = _ROWS // num_devices
    return next(parts for parts in range(1, share + 1) if share % parts == 0 and share // parts <= side_by_side)


@bounded_cache(16)
def _make_update(model: Model, num_devices: int, parts: int) -> tuple[Step, optax.GradientTransformation]:
    def sums(update: Params, data: _Rows, part: Part, key: Key) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        target = data.target
        drawn = jax.random.randint(key, (_ROWS,), 0, len(data.regions), dtype=jnp.int32)[part.numbers]
        params = jax.tree.map(lambda leaf, moved: leaf[drawn] + moved[None], data.params, update)

        def of_row(params: Params, region: Int[Array, ""]) -> tuple[jax.Array, jax.Array]:
            graph, windows = region_windows(target, region, data.starts)
            return huber_sums(target_forecast(model, target, params, graph, windows), windows.target, windows.mask)

        totals, counts = jax.vmap(of_row)(params, data.regions[drawn])
        return totals.sum(), counts.sum(), {}

    optimiser = clipped_descent()
    terms = [LossTerm("train_loss", sums, _ROWS)]
    return make_step(terms, optimiser, num_devices=num_devices, accumulate=parts), optimiser
