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
_OWN_GROUPS = pathlib.Path("/proc/self/cgroup")


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
    known = [_available(), *map(_left_of, _own_groups())]
    return min((count for count in known if count is not None), default=None)


def _available() -> int | None:
    with contextlib.suppress(OSError, KeyError, ValueError):
        return _table(_MEMINFO)["MemAvailable"] * 1024
    return None


def _own_groups() -> list[pathlib.Path]:
    """Folders of the control groups of this process that may limit its memory, of either version, up to the root."""
    places = {_CGROUPS: pathlib.PurePosixPath("/"), _CGROUPS / "memory": pathlib.PurePosixPath("/")}
    with contextlib.suppress(OSError, ValueError):
        for line in _OWN_GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                places[_CGROUPS / controllers] = pathlib.PurePosixPath(path)
    return [base / str(one).lstrip("/") for base, path in places.items() for one in (path, *path.parents)]


def _left_of(group: pathlib.Path) -> int | None:
    """Bytes that a control group leaves, files that the system can drop among them; None where it has no limit."""
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        with contextlib.suppress(OSError, KeyError, ValueError):  # a limit of "max" is no number
            most, held, stat = int((group / limit).read_text()), int((group / used).read_text()), group / "memory.stat"
            prefix = "total_" if limit == "memory.limit_in_bytes" else ""
            files = _table(stat)
            return max(0, most - held + files[f"{prefix}inactive_file"] + files[f"{prefix}active_file"])
    return None


def _table(path: pathlib.Path) -> Mapping[str, int]:
    """Names and numbers of lines such as `MemAvailable: 12 kB` or `inactive_file 12`."""
    words = [line.split() for line in path.read_text().splitlines()]
    return {name.rstrip(":"): int(number) for name, number, *_ in words if number.isdecimal()}
