"""In: a start for every region of a target city, directions of the zoo, the support days. Out: the starts, moved.

A few gradient steps in the few directions in which regions of the sources differ from their pooled model, each as long
as regions usually differ: the zoo is the prior of what three days can't show.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gpdiff_jax.data.target import Target, region_windows
from gpdiff_jax.errors import NotFiniteError
from gpdiff_jax.models.loss import masked_huber
from gpdiff_jax.models.protocol import Model
from gpdiff_jax.training.caches import bounded_cache
from gpdiff_jax.training.parallel import DEVICES, ShardedRows, is_counted
from gpdiff_jax.transfer.damped import target_forecast
from gpdiff_jax.typing import Params
from gpdiff_jax.vectors import evenly

# Coordinates of regions vary by about one over the zoo. Steps too long for a city drive them apart, each further than
# the last; none goes further than this.
_FURTHEST = 8.0


def move_along_directions(
    model: Model,
    target: Target,
    params: Params,
    directions: Params,
    *,
    steps: int,
    rate: float,
    momentum: float = 0.0,
    most_windows: int,
    rows_side_by_side: int,
    update: Params | None = None,
) -> Params:
    """Moves the parameters of every region along the directions, by gradient descent on the support days.

    A region's coordinates z begin at 0 and take steps z + v, with v = momentum v - rate (g / 2 + mean of g over the
    city / 2), where g is the gradient of its mean Huber loss on its support windows, each seen through the days that it
    does not forecast (the heavy ball of Polyak, "Some methods of speeding up the convergence of iteration methods",
    1964). No coordinate goes beyond 8. Where the support holds fewer windows than days that were read throughout, the
    steps are shorter by as much: the less was read, the nearer parameters stay to the prior.

    Args:
      model: the forecaster.
      target: the city.
      params: initial ones, leaves [K, R, ...]; every sample moves on its own.
      directions: leaves [n, ...]; see `directions.zoo_directions`.
      steps: number of steps.
      rate: length of a step.
      momentum: part of the step before that a step goes on with, in [0, 1).
      most_windows: of a region in every step, spread evenly over the support.
      rows_side_by_side: regions that a device works on at a time.
      update: leaves [...], added to the initial parameters of all regions first; see `shared.city_update`.

    Returns:
      Parameters, leaves [K, R, ...]. A region without a visible reading moves with the city; where the support holds no
      window, all come back as they were.

    Raises:
      NotFiniteError: a loss of a step, or its gradient, is not finite.
    """
    starts = spread_windows(target, most_windows)
    if len(starts) == 0:
        return params
    rate *= share_of_windows(target)
    samples, regions = jax.tree.leaves(params)[0].shape[0], target.num_regions
    shared = (target.bare, directions, update, starts, np.int32(steps), np.float32(rate), np.float32(momentum))
    rows = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[2:]), params)
    numbers = np.arange(samples * regions, dtype=np.int32)
    spread = ShardedRows(_make_move(model, samples, rows_side_by_side), shared, joint=True)
    moved, finite = spread((rows, numbers)).read()
    if not np.all(finite):
        raise NotFiniteError(f"steps in codes of length {rate:g} left the finite numbers; lower `code_rate`")
    return jax.tree.map(lambda leaf: leaf.reshape(samples, regions, *leaf.shape[1:]), moved)


def spread_windows(target: Target, most: int) -> Int[np.ndarray, " B"]:
    """Starts of at most so many of the support's windows, evenly spread."""
    starts = np.asarray(target.support_starts)
    return starts[evenly(len(starts), most)] if len(starts) else starts


def share_of_windows(target: Target) -> float:
    """How many windows the support holds, as a part of those that it would hold if it were read throughout."""
    bank = target.bank
    most = len(target.split.support) - bank.history - bank.horizon + 1
    return min(1.0, len(target.support_starts) / max(most, 1))


def city_means(own: Float[Array, "X n"], sample: Int[Array, " X"], samples: int, regions: int) -> Float[Array, "X n"]:
    """Every row's mean over all rows of its sample, on whichever of the `DEVICES` of joint `ShardedRows` they lie.

    Args:
      own: what is averaged.
      sample: the sample of every row.
      samples: K.
      regions: R, rows of a sample. A row that only fills up a device is not counted.

    Returns:
      The mean that each row takes part in.
    """
    counted = is_counted(len(sample), samples * regions)
    member = jax.nn.one_hot(sample, samples, dtype=own.dtype) * counted[:, None].astype(own.dtype)
    means = jax.lax.psum(member.T @ own, DEVICES) / jax.lax.psum(member.sum(axis=0), DEVICES)[:, None]
    return means[sample]


@bounded_cache(16)
def _make_move(
    model: Model, samples: int, side_by_side: int
) -> Callable[[tuple, tuple], tuple[Params, Bool[Array, " X"]]]:
    batch_size = side_by_side if side_by_side > 1 else None

    def at(start: Params, directions: Params, update: Params | None, z: Float[Array, " n"]) -> Params:
        start = start if update is None else jax.tree.map(jnp.add, start, update)
        return jax.tree.map(lambda leaf, axes: leaf + jnp.tensordot(z, axes, axes=1), start, directions)

    def loss(z: Float[Array, " n"], shared: tuple, start: Params, region: Int[Array, ""]) -> Float[Array, ""]:
        target, directions, update, starts, *_ = shared
        graph, windows = region_windows(target, region, starts)
        forecast = target_forecast(model, target, at(start, directions, update, z), graph, windows)
        return masked_huber(forecast, windows.target, windows.mask)

    def move(shared: tuple, rows: tuple) -> tuple[Params, Bool[Array, " X"]]:
        (target, directions, update, _, steps, rate, momentum), (starts, numbers) = shared, rows
        regions, sample = numbers % target.num_regions, numbers // target.num_regions

        def gradient(row: tuple) -> Float[Array, " n"]:
            start, region, z = row
            return jax.grad(loss)(z, shared, start, region)

        def step(_: Int[Array, ""], moving: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            z, velocity = moving
            own = jax.lax.map(gradient, (starts, regions, z), batch_size=batch_size)
            both = 0.5 * (own + city_means(own, sample, samples, target.num_regions))
            velocity = momentum * velocity - rate * both
            return jnp.clip(z + velocity, -_FURTHEST, _FURTHEST), velocity

        nowhere = jnp.zeros((len(numbers), jax.tree.leaves(directions)[0].shape[0]), rate.dtype)
        z, _ = jax.lax.fori_loop(0, steps, step, (nowhere, nowhere))
        moved = jax.vmap(functools.partial(at, directions=directions, update=update))(starts, z=z)
        return moved, jnp.isfinite(z).all(axis=1)

    return move
