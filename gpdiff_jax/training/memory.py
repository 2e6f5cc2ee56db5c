"""In: what is about to be held. Out: whether this machine has room for it, before anything is made of it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpdiff_jax.host_memory import host_bytes, in_words
from gpdiff_jax.typing import Device


class NoRoomError(MemoryError):
    """Report what takes more memory than there is, before it is begun."""


def bytes_of(tree: Any) -> int:
    """Bytes of all arrays of a pytree, or of arrays of the shapes and types that it holds."""
    return sum(math.prod(leaf.shape) * np.dtype(_plain(leaf.dtype)).itemsize for leaf in jax.tree.leaves(tree))


def free_bytes(device: Device | None = None) -> int | None:
    """Memory that may still be taken.

    Args:
      device: whose; None for the host, whose memory a CPU's is.

    Returns:
      Bytes; of a host the least that the system and the control group of this process leave, swapping aside. None where
      the system does not tell.
    """
    if device is None or device.platform == "cpu":
        return host_bytes()
    stats = device.memory_stats() or {}
    if not {"bytes_limit", "bytes_in_use"} <= stats.keys():
        return None
    return stats["bytes_limit"] - stats["bytes_in_use"]


def check_room(wanted: int, what: str, device: Device | None = None) -> None:
    """Raises `NoRoomError` where something takes more memory than is free.

    Args:
      wanted: bytes of it, those that are certain.
      what: it, for the message.
      device: where it is to lie; None for the host.
    """
    free = free_bytes(device)
    if free is not None and wanted > free:
        where = "this machine" if device is None or device.platform == "cpu" else str(device)
        raise NoRoomError(f"{what} would take {in_words(wanted)} and {where} has {in_words(free)} free")


def _plain(dtype: Any) -> Any:
    """A type that numpy knows; random keys are two numbers of 32 bits."""
    return np.uint64 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else dtype
