"""In: functions that make programs for models and configurations. Out: the last few of each, and a way to let all go.

What JAX compiled for a function is held as long as the function is, so whoever makes functions must not hold them for
ever: a long session over many models would keep every program it ever ran.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax

_Function = TypeVar("_Function", bound=Callable[..., Any])
_caches: list[Any] = []


def bounded_cache(most: int) -> Callable[[_Function], _Function]:
    """Makes a function remember its last results, by its arguments.

    Args:
      most: how many results.

    Returns:
      A decorator; what it makes has `cache_info` and `cache_clear`, and `clear_caches` clears it too.
    """

    def decorate(function: _Function) -> _Function:
        cached: Any = functools.lru_cache(maxsize=most)(function)
        _caches.append(cached)
        return cached

    return decorate


def clear_caches() -> None:
    """Lets go of every model and every compiled program that this library and JAX remember.

    They are made again when they are needed. For a process that works on many models or sizes one after another.

    Example:
      >>> import gpdiff_jax as gpd
      >>> gpd.clear_caches()
    """
    for cached in _caches:
        cached.cache_clear()
    jax.clear_caches()
