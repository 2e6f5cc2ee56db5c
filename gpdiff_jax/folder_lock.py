"""In: a folder that a process writes into. Out: no other process does meanwhile; or which one does, in one line.

The lock is the operating system's (`flock`): it ends with its process, however that ends, so none is ever stale. Where
a file system has no such locks, the process that is named in the file counts while it is alive on this machine.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Iterator

from gpdiff_jax.errors import InputError
from gpdiff_jax.files import open_plain
from gpdiff_jax.hosts import is_first

_NAME = ".lock"
# Descriptors of this process's locks, which close with it, and how often each was taken.
_held: dict[pathlib.Path, tuple[int, int]] = {}


def lock_folder(folder: pathlib.Path, *, outside: bool = False) -> None:
    """Locks a folder for this process, until as many calls of `unlock_folder`, or the end of the process.

    Of several hosts the first holds the lock for all.

    Args:
      folder: an existing folder.
      outside: keep the lock's file beside the folder, which need not exist or may be replaced as a whole.

    Raises:
      InputError: another process holds it; names that. Or the lock is a link, a pipe or a folder.
    """
    if not is_first():
        return
    path = _path(folder, outside)
    if path in _held and _is_open(_held[path][0], path):
        _held[path] = _held[path][0], _held[path][1] + 1
        return
    descriptor = open_plain(path, os.O_RDWR | os.O_CREAT)
    try:
        _acquire(descriptor, folder)
        me = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "since": f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(me).encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    _held[path] = descriptor, 1


def unlock_folder(folder: pathlib.Path, *, outside: bool = False) -> None:
    """Undoes one `lock_folder`, the last of which gives the lock back; does nothing where this process holds none."""
    path = _path(folder, outside)
    descriptor, count = _held.pop(path, (None, 0))
    if descriptor is not None and count > 1:
        _held[path] = descriptor, count - 1
    elif descriptor is not None:
        os.close(descriptor)


@contextlib.contextmanager
def locked_folder(folder: pathlib.Path | None, *, outside: bool = False) -> Iterator[None]:
    """Holds a folder's lock for the length of a `with` block; see `lock_folder`. None locks nothing."""
    if folder is None:
        yield
        return
    lock_folder(folder, outside=outside)
    try:
        yield
    finally:
        unlock_folder(folder, outside=outside)


def refuse_if_locked(folder: pathlib.Path) -> None:
    """Raises `InputError` at once where another process writes into a folder; makes no folder and no file."""
    if os.path.lexists(folder / _NAME):
        lock_folder(folder)
        unlock_folder(folder)


def _path(folder: pathlib.Path, outside: bool) -> pathlib.Path:
    place = folder.resolve()
    return place.with_name(f".{place.name}{_NAME}") if outside else place / _NAME


def _acquire(descriptor: int, folder: pathlib.Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES) or _is_alive(_owner(descriptor)):
            owner = _owner(descriptor)
            who = (
                f"process {owner['process']} on {owner['host']} since {owner['since']}" if owner else "another process"
            )
            raise InputError(
                f"folder {str(folder)!r} is in use by another run ({who}); wait for it to end, or name another folder"
            ) from error


def _owner(descriptor: int) -> dict | None:
    with contextlib.suppress(ValueError, OSError):
        content = json.loads(os.pread(descriptor, 4096, 0))
        if isinstance(content, dict) and {"process", "host", "since"} <= content.keys():
            return content
    return None


def _is_alive(owner: dict | None) -> bool:
    if owner is None or owner["host"] != socket.gethostname() or owner["process"] == os.getpid():
        return False
    try:
        os.kill(int(owner["process"]), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True


def _is_open(descriptor: int, path: pathlib.Path) -> bool:
    """Whether the descriptor still is the file of that name, not of a folder that was removed since."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False
