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
from gpdiff_jax.training.caches import bounded_cache
from gpdiff_jax.training.loop import Step, train
from gpdiff_jax.training.optimisers import clipped_adam
from gpdiff_jax.training.parallel import training_devices
from gpdiff_jax.training.step import LossTerm, Part, make_step, start_training
from gpdiff_jax.transfer.damped import target_forecast
from gpdiff_jax.typing import Key, Params

# Of one step: rows, each a region with one of its samples, and windows of each.
_ROWS, _WINDOWS = 32, 16


class _Rows(NamedTuple):
    """What every step reads."""

    target: Target
    params: Params  # initial ones, leaves [X, ...]
    starts: Int[Array, "*devices B"]  # of the support windows


def move_together(
    model: Model, target: Target, params: Params, *, steps: int, rate: float, key: Key, plain: bool = False
) -> Params:
    """Adds one vector to the parameters of all regions and samples, trained on the support days of the city.

    A step is one of Adam, or of plain gradient descent, on the mean Huber loss of random windows of random regions,
    each seen through the days that it does not forecast; every region and sample is as likely.

    Args:
      model: the forecaster.
      target: the city.
      params: initial ones, leaves [K, R, ...].
      steps: number of steps.
      rate: learning rate.
      key: random key of the windows.
      plain: gradient descent instead of Adam.

    Returns:
      Parameters, leaves [K, R, ...]; as they were where the support holds no window.

    Raises:
      NotFiniteError: a loss or its gradient is not finite.
    """
    if len(target.support_starts) == 0:
        return params
    rows = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[2:]), params)
    devices = training_devices(_ROWS)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), rows)
    step, optimiser = _make_update(model, rate, plain, len(devices))
    moved = train(
        step,
        start_training(nothing, optimiser),
        _Rows(target.bare, jax.device_put(rows), target.support_starts),
        key=key,
        steps=steps,
        evaluate_every=steps,
        devices=devices,
        name="update of the city",
    ).params
    return jax.tree.map(lambda leaf, update: np.asarray(leaf) + np.asarray(update), params, moved)


@bounded_cache(16)
def _make_update(model: Model, rate: float, plain: bool, num_devices: int) -> tuple[Step, optax.GradientTransformation]:
    def sums(update: Params, data: _Rows, part: Part, key: Key) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        row_key, window_key = jax.random.split(key)
        target, count = data.target, jax.tree.leaves(data.params)[0].shape[0]
        drawn = jax.random.randint(row_key, (_ROWS,), 0, count, dtype=jnp.int32)[part.numbers]
        params = jax.tree.map(lambda leaf, moved: leaf[drawn] + moved[None], data.params, update)

        def of_row(params: Params, region: Int[Array, ""], key: Key) -> tuple[jax.Array, jax.Array]:
            starts = jax.random.choice(key, data.starts, (_WINDOWS,))
            graph, windows = region_windows(target, region, starts)
            return huber_sums(target_forecast(model, target, params, graph, windows), windows.target, windows.mask)

        keys = jax.random.split(window_key, _ROWS)[part.numbers]
        totals, counts = jax.vmap(of_row)(params, drawn % target.num_regions, keys)
        return totals.sum(), counts.sum(), {}

    optimiser = optax.sgd(rate) if plain else clipped_adam(rate)
    return make_step([LossTerm("train_loss", sums, _ROWS)], optimiser, num_devices=num_devices), optimiser
