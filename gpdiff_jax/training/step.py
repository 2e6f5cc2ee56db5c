"""In: the terms of a loss, an optimiser and a number of devices. Out: one pure step of training, for `loop.train`.

A step runs on every device at once, inside `jax.pmap` over the axis `DEVICES`: each device takes its share of the
batch, and sums of gradients meet in a `psum`. A loss is a sum of ratios of sums over examples, so that neither the
number of devices nor of accumulated parts changes more than rounding.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Int

from gpdiff_jax.errors import InputError
from gpdiff_jax.training.parallel import DEVICES
from gpdiff_jax.typing import Key, Params

Metrics = dict[str, jax.Array]


class Part(NamedTuple):
    """Which examples of a batch: those numbered `first` to `first + count`, and the step whose batch it is."""

    first: Int[Array, ""]
    count: int
    step: Int[Array, ""]

    @property
    def numbers(self) -> jax.Array:
        """int32 [count]."""
        return self.first + jnp.arange(self.count, dtype=jnp.int32)


LossSums = Callable[[Params, Any, Part, Key], tuple[jax.Array, jax.Array, Metrics]]
"""`sums(params, data, part, key) -> (total, weight, metrics)`: over a part of a batch the sum of the losses, the sum of
their weights, and sums of what else is to be logged. What is drawn for an example depends on the key, which is the
step's own, and on its number alone."""


class LossTerm(NamedTuple):
    """One ratio in a loss: `coefficient` times the total over the weight of a batch."""

    name: str  # of the ratio, in the metrics
    sums: LossSums
    batch: int  # B, examples of one step
    coefficient: float = 1.0
    coupled: bool = False  # examples see each other: every device and part is given the batch whole


@flax.struct.dataclass
class TrainState:
    """What a training carries from step to step; float32, whatever is computed in."""

    step: Int[Array, "*devices"]
    params: Params
    opt_state: optax.OptState  # of the parameters as one vector
    average: Params | None  # running average of the parameters; None where none is kept

    @property
    def kept(self) -> Params:
        """What is evaluated and kept: the average where there is one."""
        return self.params if self.average is None else self.average


@functools.partial(jax.jit, static_argnames=("optimiser", "averaged"))
def start_training(params: Params, optimiser: optax.GradientTransformation, *, averaged: bool = False) -> TrainState:
    """The state before the first step, on the default device; an average begins at the parameters."""
    opt_state = optimiser.init(ravel_pytree(params)[0])
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, params if averaged else None)


def of_type(params: Params, dtype: Any) -> Params:
    """Parameters in the type of the data: layers make theirs in float32 whatever the mode."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def make_step(
    terms: Sequence[LossTerm],
    optimiser: optax.GradientTransformation,
    *,
    num_devices: int,
    accumulate: int = 1,
    averaging: float = 0.0,
) -> Callable[[TrainState, Any, Key], tuple[TrainState, Metrics]]:
    """Makes one step of training.

    Args:
      terms: of the loss.
      optimiser: of the parameters.
      num_devices: that share the batch of every term that is not coupled; where it does not divide it, the first ones
        take an example more, by a program of their own.
      accumulate: parts that a device works on its share of a batch in, one after another, which takes less memory.
      averaging: decay of the running average; it is shorter in the first steps, which would otherwise linger in it. 0
        where the state has no average.

    Returns:
      `step(state, data, key) -> (state, metrics)`, to be mapped over `DEVICES`; the key is that of the whole training.
      The metrics are the loss, its terms, what the terms log, and the norms of gradient, update and parameters.

    Raises:
      InputError: a batch that devices and parts cannot share evenly.
    """
    for term in terms:
        if not term.coupled and accumulate > 1:
            check_share(term.batch, num_devices, accumulate)

    def gradient(term: LossTerm, state: TrainState, data: Any, key: Key) -> tuple[jax.Array, jax.Array, Metrics]:
        parts = 1 if term.coupled else accumulate

        def part(first: jax.Array, count: int) -> tuple[Params, tuple]:
            def total(params: Params) -> tuple[jax.Array, tuple]:
                loss, weight, metrics = term.sums(params, data, Part(first, count, state.step), key)
                return loss, (loss, weight, metrics)

            return jax.grad(total, has_aux=True)(state.params)

        def share(first: jax.Array, count: int) -> tuple[Params, tuple]:
            """What `count` examples of this device give, part by part."""
            if parts == 1:
                return part(first, count)

            def add(held: Params, first: jax.Array) -> tuple[Params, tuple]:
                grads, sums = part(first, count // parts)
                return jax.tree.map(jnp.add, held, grads), sums

            firsts = first + count // parts * jnp.arange(parts, dtype=jnp.int32)
            grads, sums = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, state.params), firsts)
            return grads, jax.tree.map(lambda leaf: leaf.sum(axis=0), sums)

        place = jax.lax.axis_index(DEVICES).astype(jnp.int32)
        least, more = divmod(term.batch, num_devices)
        if term.coupled:
            grads, sums = share(jnp.int32(0), term.batch)
        elif not more:
            grads, sums = share(least * place, least)
        else:
            # The first `more` devices have one example more than the others.
            def others() -> tuple[Params, tuple]:
                if least:
                    return share(least * place + more, least)
                return jax.tree.map(jnp.zeros_like, jax.eval_shape(lambda: share(place, 1)))

            grads, sums = jax.lax.cond(place < more, lambda: share((least + 1) * place, least + 1), others)
        # As one vector: one sum over the devices, and one fused update, instead of one for every leaf.
        vector, (loss, weight, metrics) = jax.lax.psum((ravel_pytree(grads)[0], sums), DEVICES)
        # Where nobody was observed, all sums are zero.
        scale = 1.0 / jnp.where(weight > 0, weight, jnp.ones_like(weight))
        return (
            term.coefficient * scale.astype(vector.dtype) * vector,
            loss * scale,
            {name: value * scale for name, value in metrics.items()},
        )

    def step(state: TrainState, data: Any, key: Key) -> tuple[TrainState, Metrics]:
        own = jax.random.fold_in(key, state.step)
        parts = [gradient(term, state, data, own) for term in terms]
        grads = sum((part[0] for part in parts[1:]), parts[0][0])
        loss = sum((term.coefficient * part[1] for term, part in zip(terms, parts, strict=True)), jnp.zeros(()))
        params: Any
        params, as_tree = ravel_pytree(state.params)
        updates, opt_state = optimiser.update(grads, state.opt_state, params)
        params = optax.apply_updates(params, updates)
        average: Any = state.average
        if average is not None:
            count = state.step.astype(jnp.float32)
            decay = jnp.minimum(averaging, (1.0 + count) / (10.0 + count))
            held, _ = ravel_pytree(average)
            average = as_tree(held + (1.0 - decay).astype(held.dtype) * (params - held))
        metrics = {term.name: part[1] for term, part in zip(terms, parts, strict=True)}
        for _, _, logged in parts:
            metrics |= logged
        norms = {"grad_norm": grads, "update_norm": updates, "param_norm": params}
        metrics |= {"loss": loss} | {name: optax.tree.norm(vector) for name, vector in norms.items()}
        return TrainState(state.step + 1, as_tree(params), opt_state, average), metrics

    return step


def check_share(batch: int, num_devices: int, accumulate: int = 1) -> None:
    """Raises `InputError` where a batch cannot be cut evenly over devices and accumulated parts."""
    if batch % (num_devices * accumulate):
        raise InputError(
            f"`batch` (={batch}) must be a multiple of {num_devices} devices x {accumulate} accumulated parts "
            f"(={num_devices * accumulate}); change the batch, or train on fewer devices"
        )
