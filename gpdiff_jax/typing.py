"""In: nothing. Out: the shape letters of the project and the array aliases that use them.

An axis over what is independent comes before one over what is not: devices, K or V, R, B, then the rest.

    R regions           B batch            S test windows      K generated samples   M vectors of a region
    N nodes of a region graph (centre first)                   E prompt width
    H history steps     P horizon steps    C channels          F covariates          T series length
    L tokens            W token width      Z rows of a latent  D entries of its row
    V random windows of a source region, or spans that leave a day of a target out (variants); of prompts, the first
    I inputs of a node  Q patches of time  G width of a time encoding                X, Y whatever else

What is spread over devices has one more axis in front, `*devices`.
"""

from typing import Any

import jax

Params = Any
"""A pytree of float32 arrays: the parameters of one region's forecaster, or of many, stacked on axis 0."""

RegionGraph = Any
"""A padded `jraph.GraphsTuple`, one or stacked; jraph's own annotations call every field optional."""

Key = jax.Array
"""A typed key, as `jax.random.key` makes it."""

Device = Any
"""A device of JAX, as `jax.local_devices()` lists them; JAX's own name for the type is a variable."""
