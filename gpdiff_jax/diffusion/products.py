"""In: tokens of many regions. Out: dense layers and attention over them, which are flax's own with cheaper products.

On a CPU a product of two matrices, and its gradient, runs at the full pace; one over several axes is first copied into
another order, and its gradient runs at two thirds of it. On an NVIDIA GPU, attention in 16 bits is cuDNN's, which never
writes its weights to memory (Dao et al., "FlashAttention", arXiv 2205.14135).
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def rows_dot_general(
    x: jax.Array, kernel: jax.Array, dimension_numbers: Any, precision: Any = None, **options: Any
) -> jax.Array:
    """`jax.lax.dot_general` for the last axes of `x` with the first of `kernel`, as one product of two matrices.

    Args:
      x: [..., C...].
      kernel: [C..., D...].
      dimension_numbers: as `jax.lax.dot_general` takes them; they must name those axes and no batch.
      precision: of the product.
      **options: for `jax.lax.dot_general`.

    Returns:
      [..., D...].

    Raises:
      ValueError: other axes are named.
    """
    (of_x, of_kernel), batch = dimension_numbers
    count = len(of_kernel)
    contracted = tuple(of_x), tuple(of_kernel)
    if contracted != (tuple(range(x.ndim - count, x.ndim)), tuple(range(count))) or any(batch):
        raise ValueError(f"`dimension_numbers` must be of a dense layer, got {dimension_numbers}")
    size = math.prod(kernel.shape[:count])
    product = jax.lax.dot_general(
        x.reshape(-1, size), kernel.reshape(size, -1), (((1,), (0,)), ((), ())), precision, **options
    )
    return product.reshape(*x.shape[: x.ndim - count], *kernel.shape[count:])


def dense(features: int, **options: Any) -> nn.Dense:
    """`nn.Dense` over all rows of all regions at once."""
    return nn.Dense(features, dot_general=rows_dot_general, **options)


def attention(heads: int, dtype: np.dtype, *, name: str, length: int | None = None) -> nn.MultiHeadDotProductAttention:
    """`nn.MultiHeadDotProductAttention` over tokens, its projections over all rows of all regions at once.

    Its softmax is at least float32 whatever `dtype` it computes in. Where `has_fused_attention`, and without a mask,
    only the first `length` tokens are attended to.
    """
    options: Any = {}
    if has_fused_attention(dtype):
        options["attention_fn"] = functools.partial(fused_attention, length=length)
    return nn.MultiHeadDotProductAttention(
        heads,
        dtype=dtype,
        force_fp32_for_softmax=dtype.itemsize < 4,
        **options,
        qkv_dot_general=rows_dot_general,
        out_dot_general=rows_dot_general,
        name=name,
    )


def has_fused_attention(dtype: np.dtype) -> bool:
    """Whether cuDNN's attention runs in a type on this process's devices: in 16 bits, on NVIDIA's Ampere and later."""
    if dtype.itemsize != 2 or jax.default_backend() != "gpu":
        return False
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    return capability.split(".")[0].isdecimal() and float(capability) >= 8.0


def fused_attention(
    query: Float[Array, "*B L heads C"],
    key: Float[Array, "*B M heads C"],
    value: Float[Array, "*B M heads C"],
    mask: Bool[Array, "..."] | None = None,
    *,
    length: int | None = None,
    implementation: Any = "cudnn",
) -> Float[Array, "*B L heads C"]:
    """`nn.dot_product_attention` by one kernel; by flax itself where there is a mask, or heads that the kernel refuses.

    Args:
      query: of L tokens.
      key: of M tokens.
      value: of the same.
      mask: which keys may be attended to; None for all.
      length: where there is no mask, how many keys may be attended to, the first ones; None for all.
      implementation: of `jax.nn.dot_product_attention`.

    Returns:
      What every token reads.
    """
    width = query.shape[-1]
    length = key.shape[-3] if length is None else length
    if mask is not None or width % 8 or width > 128:
        if mask is None:
            mask = jnp.broadcast_to(jnp.arange(key.shape[-3]) < length, (*query.shape[:-3], 1, 1, key.shape[-3]))
        return nn.dot_product_attention(query, key, value, mask=mask, force_fp32_for_softmax=True)
    # Its gradient asks for even lengths; what is added is not read.
    rows = [tokens.reshape(-1, *tokens.shape[-3:]) for tokens in (query, key, value)]
    padded = [jnp.pad(tokens, ((0, 0), (0, tokens.shape[1] % 2), (0, 0), (0, 0))) for tokens in rows]
    lengths: Any = {}
    if length < padded[1].shape[1]:
        lengths = {"key_value_seq_lengths": jnp.full(len(rows[1]), length, jnp.int32)}
    read = jax.nn.dot_product_attention(*padded, implementation=implementation, **lengths)
    return read[:, : query.shape[-3]].reshape(query.shape)
