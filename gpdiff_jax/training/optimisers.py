"""In: a learning rate. Out: Adam on clipped gradients, the optimiser that all trainings share."""

import jax
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
