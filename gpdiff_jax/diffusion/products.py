"""In: tokens of many regions. Out: dense layers and attention over them, which are flax's own with cheaper products.

On a CPU a product of two matrices, and its gradient, runs at the full pace; one over several axes is first copied into
another order, and its gradient runs at two thirds of it.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np


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


def attention(heads: int, dtype: np.dtype, *, name: str) -> nn.MultiHeadDotProductAttention:
    """`nn.MultiHeadDotProductAttention` over tokens, its projections over all rows of all regions at once.

    Its softmax is at least float32 whatever `dtype` it computes in.
    """
    return nn.MultiHeadDotProductAttention(
        heads,
        dtype=dtype,
        force_fp32_for_softmax=dtype.itemsize < 4,
        qkv_dot_general=rows_dot_general,
        out_dot_general=rows_dot_general,
        name=name,
    )
