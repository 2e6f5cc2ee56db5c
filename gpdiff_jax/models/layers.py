"""In: features of a region graph. Out: the parts that models share.

Small features are [N, T, ..., C], batch axes between time and channels, and every product is made of two matrices: XLA
on a CPU takes seven times as long for the gradient of one over several axes. Wide ones are [N, C, T, ...], batch last.
Either way a slice of time is one block of memory and mixing over nodes is one matrix product.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def dense(x: Float[Array, "*X C"], features: int, *, name: str, use_bias: bool = True) -> Float[Array, "*X D"]:
    """`nn.Dense` of the calling module, applied to all rows at once."""
    rows = nn.Dense(features, use_bias=use_bias, name=name)(x.reshape(-1, x.shape[-1]))
    return rows.reshape(*x.shape[:-1], features)


def channels_first(x: Float[Array, "N T *B C"]) -> Float[Array, "N C T *B"]:
    """The layout of `ChannelDense` and `carry_channels`."""
    return jnp.moveaxis(x, -1, 1)


@jax.custom_vjp
def channel_product(kernel: Float[Array, "C D"], x: Float[Array, "N C X"]) -> Float[Array, "N D X"]:
    """The product of `ChannelDense`."""
    return jnp.broadcast_to(kernel.T, (x.shape[0], *kernel.T.shape)) @ x


def _channel_product_forward(kernel: jax.Array, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return channel_product(kernel, x), (kernel, x)


def _channel_product_backward(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    kernel, x = saved
    # A product of few rows is slow.
    few = kernel.shape[0] <= 8
    by_node = jnp.swapaxes(grad @ jnp.swapaxes(x, 1, 2), 1, 2) if few else x @ jnp.swapaxes(grad, 1, 2)
    # A sum over nodes would be fused with the product, which would then run at two thirds of its pace.
    summed = jnp.ones((1, x.shape[0]), grad.dtype) @ by_node.reshape(x.shape[0], -1)
    return summed.reshape(kernel.shape), jnp.broadcast_to(kernel, (x.shape[0], *kernel.shape)) @ grad


channel_product.defvjp(_channel_product_forward, _channel_product_backward)


class ChannelDense(nn.Module):
    """A dense layer over the channels of axis 1, for wide features.

    One product per node of the kernel with [C, rows], rows beside each other: on a CPU it and both its gradients run at
    the pace of large products, where a gradient that sums over [rows, C] runs at half; and channels side by side, or
    apart, are whole blocks of memory.
    """

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "N C *X"]) -> Float[Array, "N D *X"]:
        """Returns the layer's outputs, with the axes of `x` behind the channels."""
        num_nodes, width = x.shape[:2]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (width, self.features))
        y = channel_product(kernel, x.reshape(num_nodes, width, -1))
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros_init(), (self.features,))[None, :, None]
        return y.reshape(num_nodes, self.features, *x.shape[2:])


def carry_channels(walks: Float[Array, "M S N"], x: Float[Array, "N C *X"]) -> Float[Array, "M SC *X"]:
    """Features carried along S walks, side by side as channels: entry [m, s] of the walks is row m of walk s."""
    num_walks = walks.shape[1]
    carried = _carry(walks.reshape(-1, walks.shape[2]), x.reshape(x.shape[0], -1))
    return carried.reshape(walks.shape[0], num_walks * x.shape[1], *x.shape[2:])


@jax.custom_vjp
def _carry(walks: Float[Array, "M N"], rows: Float[Array, "N X"]) -> Float[Array, "M X"]:
    return walks @ rows


def _carry_forward(walks: jax.Array, rows: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _carry(walks, rows), (walks, rows)


def _carry_backward(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    walks, rows = saved
    # The product with the transpose in place would run at half the pace.
    return grad @ rows.T, jax.lax.optimization_barrier(walks.T) @ grad


_carry.defvjp(_carry_forward, _carry_backward)


def unfold(x: Float[Array, "N C T *B"], kernel_size: int) -> Float[Array, "N KC T2 *B"]:
    """Every window of `kernel_size` steps, its steps side by side as channels."""
    steps = x.shape[2] - kernel_size + 1
    return jnp.concatenate([jax.lax.slice_in_dim(x, k, k + steps, axis=2) for k in range(kernel_size)], axis=1)


@jax.custom_vjp
def add_shared(x: Float[Array, "N *X C"], shared: Float[Array, "*X C"]) -> Float[Array, "N *X C"]:
    """Adds the same to every row of axis 0; the sum in its gradient is made as a matrix product, which is faster."""
    return x + shared[None]


def _add_shared_forward(x: jax.Array, shared: jax.Array) -> tuple[jax.Array, None]:
    return add_shared(x, shared), None


def _add_shared_backward(_: None, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    summed = jnp.ones((1, grad.shape[0]), grad.dtype) @ grad.reshape(grad.shape[0], -1)
    return grad, summed.reshape(grad.shape[1:])


add_shared.defvjp(_add_shared_forward, _add_shared_backward)


def horizon_head(
    module: nn.Module, features: Float[Array, "*B D"], ahead: Float[Array, "P *B F"], *, hidden: int
) -> Float[Array, "P *B 1"]:
    """The forecast of every horizon step from the centre's features and that step's covariates.

    A head of its own per step would learn the clock of every step anew; one that sees the covariates of the step that
    it forecasts need not. The linear path from covariates to forecast makes what a region does at a given hour a linear
    function of its parameters.

    Args:
      module: the model, in whose scope the weights get their names, all beginning with `head_`.
      features: of the centre.
      ahead: covariates of the horizon steps; F may be 0.
      hidden: width of the hidden layer.

    Returns:
      Scaled forecasts.
    """
    horizon, num_covariates = ahead.shape[0], ahead.shape[-1]
    state = dense(features, hidden, name="head_state", use_bias=False)
    lead = module.param("head_lead", nn.initializers.zeros_init(), (horizon, hidden))
    # Each step's own row of a matrix, by a product with which step it is: its gradient is a product too, not a sum.
    batch = ahead.shape[1:-1]
    own_step = jnp.eye(horizon, dtype=features.dtype).reshape(horizon, *(1,) * len(batch), horizon)
    own_step = jnp.broadcast_to(own_step, (horizon, *batch, horizon)).reshape(-1, horizon)
    units = (own_step @ lead).reshape(horizon, *batch, hidden)
    if num_covariates:
        units = units + dense(ahead, hidden, name="head_covariates", use_bias=False)
    units = nn.relu(add_shared(units, state))
    readout = module.param("head_readout", nn.initializers.lecun_normal(), (horizon, hidden))
    forecast = ((units.reshape(-1, hidden) @ readout.T) * own_step).sum(axis=-1)
    forecast = forecast + own_step @ module.param("head_bias", nn.initializers.zeros_init(), (horizon,))
    if num_covariates:
        direct = module.param("head_direct", nn.initializers.zeros_init(), (num_covariates,))
        forecast = forecast + ahead.reshape(-1, num_covariates) @ direct
    return forecast.reshape(horizon, *batch, 1)
