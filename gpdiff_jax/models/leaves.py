"""In: the parameter pytree of a model. Out: its leaves by path, or one line that says why it cannot be tokenised."""

from typing import Any

import jax
import jax.numpy as jnp

from gpdiff_jax.errors import InputError
from gpdiff_jax.typing import Params


def check_leaves(params: Params) -> list[tuple[tuple[str, ...], Any]]:
    """Refuses a pytree that tokens could not give back as it was.

    Args:
      params: arrays, or their shapes and types.

    Returns:
      See `named_leaves`.

    Raises:
      InputError: see `named_leaves`; or there is no leaf, or one is empty or not float32.
    """
    named = named_leaves(params)
    if not named:
        raise InputError("the model has no parameters; a model to harvest needs some")
    for path, leaf in named:
        if leaf.dtype != jnp.float32 or leaf.size == 0:
            raise InputError(
                f"parameter {'/'.join(path)!r} is {leaf.dtype} of shape {tuple(leaf.shape)}; "
                "a model to harvest needs float32 parameters with at least one entry each"
                + ("; unset JAX_ENABLE_X64" if jax.config.read("jax_enable_x64") else "")
            )
    return named


def named_leaves(params: Params) -> list[tuple[tuple[str, ...], Any]]:
    """Paths and leaves of nested dicts, in the pytree's order.

    Args:
      params: the pytree.

    Returns:
      A path of names and a leaf, for every leaf.

    Raises:
      InputError: anything else than nested dicts with names as keys, which would not come back from a list of paths.
    """
    named, rebuilt = [], {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        path = tuple(key for part in keys if isinstance(key := getattr(part, "key", None), str))
        if not path or len(path) < len(keys):
            raise InputError(
                f"parameters must be nested dicts with names as keys, got {jax.tree_util.keystr(keys) or 'one array'}"
            )
        named.append((path, leaf))
        put_leaf(rebuilt, path, leaf)
    if named and jax.tree.structure(rebuilt) != jax.tree.structure(params):
        raise InputError("parameters must be nested dicts, none of them empty, with names as keys")
    return named


def put_leaf(params: dict, path: tuple[str, ...], value: Any) -> None:
    """Puts a value into nested dicts, which are made on the way."""
    for key in path[:-1]:
        params = params.setdefault(key, {})
    params[path[-1]] = value
