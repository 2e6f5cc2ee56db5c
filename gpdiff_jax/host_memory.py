"""In: nothing, or a file and what it unpacks to. Out: the memory that this host has left, or that it is too little."""

import contextlib
import io
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from gpdiff_jax.errors import InputError

_MEMINFO = pathlib.Path("/proc/meminfo")
_CGROUPS = pathlib.Path("/sys/fs/cgroup")
_OWN_GROUPS = pathlib.Path("/proc/self/cgroup")


def host_bytes() -> int | None:
    """Memory that may still be taken on this host.

    Returns:
      Bytes, the least that the system and the control group of this process leave, swapping aside. None where the
      system does not tell.
    """
    known = [_available(), *map(_left_of, _own_groups())]
    return min((count for count in known if count is not None), default=None)


def in_words(count: int) -> str:
    """Bytes for a message, as `1.5 GiB` or `12 MiB`."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.0f} MiB"


def check_unpacked(what: object, wanted: int) -> None:
    """Refuses a file of which reading takes more memory than this host has: a small one may unpack without bound.

    Args:
      what: the file, for the message.
      wanted: bytes that its content takes once it is read, those that are certain.

    Raises:
      InputError: they are more than are free.
    """
    free = host_bytes()
    if free is not None and wanted > free:
        raise _too_large(what, f"{in_words(wanted)}, ", free)


class BoundedReader(io.RawIOBase):
    """A stream of bytes that ends with an error where more come than this host can hold.

    Args:
      stream: what is read from.
      what: its file, for the message.
      weigh: how many bytes a piece of it takes once it is read.
    """

    def __init__(self, stream: Any, what: object, weigh: Callable[[bytes], int] = len) -> None:
        super().__init__()
        self._stream, self._what, self._free = stream, what, host_bytes()
        self._left, self._weigh = self._free, weigh

    def readable(self) -> bool:
        """As `io.RawIOBase` asks."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Reads some bytes, at most as many as there is place for; raises `InputError` where it were too many."""
        content = self._stream.read(len(buffer))
        if self._left is not None and self._free is not None:
            self._left -= self._weigh(content)
            if self._left < 0:
                raise _too_large(self._what, "", self._free)
        buffer[: len(content)] = content
        return len(content)


def _too_large(what: object, size: str, free: int) -> InputError:
    return InputError(
        f"{what} takes {size}more than the {in_words(free)} of memory that are free on this machine, once it is read; "
        "give a part of it, or use a larger machine"
    )


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
