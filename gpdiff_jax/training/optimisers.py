"""In: a learning rate. Out: Adam on clipped gradients, the optimiser that all trainings share; and plain descent.

Of those with their rate in their state, one compiled program takes any rate (`at_rate`).
"""

from typing import cast

import jax
import jax.numpy as jnp
import optax


def clipped_adam(
    learning_rate: jax.Array | float | optax.Schedule, *, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Adam (Kingma and Ba, arXiv 1412.6980) behind a clip of the gradient's global norm at one.

    Args:
      learning_rate: a number or a schedule.
      weight_decay: above 0, decoupled weight decay (AdamW, arXiv 1711.05101).

    Returns:
      The optimiser; it runs also where the caller has made JAX's promotion of types or ranks strict.
    """
    adam = optax.adamw(learning_rate, weight_decay=weight_decay) if weight_decay else optax.adam(learning_rate)
    return _promoting(optax.chain(optax.clip_by_global_norm(1.0), adam))


def clipped_descent() -> optax.GradientTransformation:
    """Gradient descent behind the same clip, with its rate in its state.

    Returns:
      The optimiser, which begins at a rate of 1: the length of a step, of a gradient of length 1.
    """
    return _rated(optax.clip_by_global_norm(1.0))


def rated_adam() -> optax.GradientTransformation:
    """`clipped_adam` with its learning rate in its state, which begins at 1."""
    return _rated(_promoting(optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())))


def at_rate(state: optax.OptState, learning_rate: float) -> optax.OptState:
    """The state of `clipped_descent` or `rated_adam` at another rate."""
    inner, _ = cast(tuple[optax.OptState, jax.Array], state)
    return inner, jnp.float32(learning_rate)


def _promoting(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimiser that raises floats to the power of its int32 step count, also where promotion is strict."""

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(updates, state, params)

    return optax.GradientTransformation(inner.init, update)


def _rated(direction: optax.GradientTransformation) -> optax.GradientTransformation:
    """Steps against a direction, as long as the rate in the state says."""

    def init(params: optax.Params) -> tuple[optax.OptState, jax.Array]:
        return direction.init(params), jnp.float32(1)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        inner, rate = cast(tuple[optax.OptState, jax.Array], state)
        directed, inner = direction.update(updates, inner, params)
        return jax.tree.map(lambda leaf: -rate * leaf, directed), (inner, rate)

    return optax.GradientTransformation(init, update)
