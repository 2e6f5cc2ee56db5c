"""In: words and arrays. Out: a hash of every byte of them."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def digest_of(words: str, tree: Any) -> str:
    """A hash of words and of every byte of a pytree of arrays and keys, by which one piece of work is known."""
    digest = hashlib.sha256(words.encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        host = np.ascontiguousarray(leaf)
        digest.update(repr((jax.tree_util.keystr(path), host.shape, str(host.dtype))).encode())
        if host.nbytes:
            digest.update(host.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
