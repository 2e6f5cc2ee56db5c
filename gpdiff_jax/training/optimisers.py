"""In: a learning rate. Out: Adam on clipped gradients, the optimiser that all trainings share; and plain descent."""

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
    inner = optax.chain(optax.clip_by_global_norm(1.0), adam)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        # Optax raises floats to the power of its int32 step count.
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(updates, state, params)

    return optax.GradientTransformation(inner.init, update)


def clipped_descent() -> optax.GradientTransformation:
    """Gradient descent behind the same clip, with its rate in its state: one compiled program takes any (`at_rate`).

    Returns:
      The optimiser, which begins at a rate of 1.
    """
    clip = optax.clip_by_global_norm(1.0)

    def init(params: optax.Params) -> tuple[optax.OptState, jax.Array]:
        return clip.init(params), jnp.float32(1)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        clip_state, rate = cast(tuple[optax.OptState, jax.Array], state)
        clipped, clip_state = clip.update(updates, clip_state, params)
        return jax.tree.map(lambda leaf: -rate * leaf, clipped), (clip_state, rate)

    return optax.GradientTransformation(init, update)


def at_rate(state: optax.OptState, learning_rate: float) -> optax.OptState:
    """The state of `clipped_descent` at another rate: the length of a step, of a gradient of length 1."""
    clip_state, _ = cast(tuple[optax.OptState, jax.Array], state)
    return clip_state, jnp.float32(learning_rate)
