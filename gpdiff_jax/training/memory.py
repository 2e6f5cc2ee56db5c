"""In: what is about to be held. Out: whether this machine has room for it, before anything is made of it."""

import contextlib
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpdiff_jax.typing import Device

_MEMINFO = pathlib.Path("/proc/meminfo")
_CGROUPS = pathlib.Path("/sys/fs/cgroup")
# Of a control group: its limit, what it uses, and the part of that which are files that the system can drop.
_CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)


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
        return _host_bytes()
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
        raise NoRoomError(f"{what} would take {_words(wanted)} and {where} has {_words(free)} free")


def _words(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.0f} MiB"


def _plain(dtype: Any) -> Any:
    """A type that numpy knows; random keys are two numbers of 32 bits."""
    return np.uint64 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else dtype


def _host_bytes() -> int | None:
    known = [_available(), *(_left_of(*names) for names in _CGROUP_FILES)]
    return min((count for count in known if count is not None), default=None)


def _available() -> int | None:
    with contextlib.suppress(OSError, KeyError, ValueError):
        return _table(_MEMINFO)["MemAvailable"] * 1024
    return None


def _left_of(limit: str, used: str, droppable: str) -> int | None:
    """Bytes that a control group leaves; None where there is none or it has no limit."""
    with contextlib.suppress(OSError, KeyError, ValueError):  # a limit of "max" is no number
        held = int((_CGROUPS / used).read_text()) - _table((_CGROUPS / used).parent / "memory.stat")[droppable]
        return max(0, int((_CGROUPS / limit).read_text()) - held)
    return None


def _table(path: pathlib.Path) -> Mapping[str, int]:
    """Names and numbers of lines such as `MemAvailable: 12 kB` or `inactive_file 12`."""
    words = [line.split() for line in path.read_text().splitlines()]
    return {name.rstrip(":"): int(number) for name, number, *_ in words if number.isdecimal()}
