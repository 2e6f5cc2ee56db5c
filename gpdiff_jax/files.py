"""In: a path and what is to lie there. Out: a file that appears whole or not at all; an npz read back, or refused."""

import contextlib
import csv
import errno
import fcntl
import io
import json
import lzma
import math
import os
import pathlib
import re
import shutil
import stat
import struct
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpdiff_jax.errors import InputError
from gpdiff_jax.host_memory import check_unpacked
from gpdiff_jax.hosts import is_first

# All that zipfile, its decompressors and numpy's header parser raise on damaged bytes.
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    tokenize.TokenError,
    SyntaxError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    OverflowError,
    RuntimeError,
)
_WAYS = {zipfile.ZIP_BZIP2: "bzip2", zipfile.ZIP_LZMA: "LZMA"}


def user_path(name: str | os.PathLike[str]) -> pathlib.Path:
    """A path as a user writes it, in which ~ is a home folder; raises `InputError` where whose is not known."""
    try:
        return pathlib.Path(name).expanduser()
    except RuntimeError:
        raise InputError(f"{str(name)!r} begins with a home folder that is not known; write the whole path") from None


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Writes a file, whole or not at all; one that is there is replaced. Of several hosts the first writes.

    What a process that was killed left of the same file is removed.

    Args:
      path: the file, in a folder that exists.
      content: its bytes.

    Raises:
      OSError: the folder cannot be written, or is full.
    """
    if not is_first():
        return
    _remove_leftovers(path)
    handle, name = _locked_partial(path)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~_umask())  # mkstemp makes files that only their owner may read
            os.replace(name, path)  # while it is locked
    except BaseException:
        pathlib.Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    """The permissions that new files of this process lack."""
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    umask = os.umask(0)  # asked in no other way elsewhere; files that other threads make meanwhile lack none
    os.umask(umask)
    return umask


def _locked_partial(path: pathlib.Path) -> tuple[int, str]:
    """A new file beside another, and its name; locked for as long as it is open, where the file system has locks."""
    while True:
        try:
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
        except OSError as error:  # of a name that nobody gave
            raise OSError(error.errno, error.strerror, str(path)) from error
        if not _lock(handle) or _is_there(handle, name):
            return handle, name
        os.close(handle)  # another process took it for a leftover before it was locked


def _remove_leftovers(path: pathlib.Path) -> None:
    """Removes unfinished files beside a file that no process holds locked."""
    name = re.compile(rf"\.{re.escape(path.name)}\.\w+\.partial")
    with contextlib.suppress(PermissionError):  # a folder may be written and not listed
        for left in path.parent.iterdir():
            if name.fullmatch(left.name):
                with contextlib.suppress(FileNotFoundError, PermissionError, InputError):
                    handle = open_plain(left, os.O_RDONLY)
                    try:
                        if _lock(handle):
                            left.unlink(missing_ok=True)
                    finally:
                        os.close(handle)


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_there(handle: int, name: str) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(name))
    except FileNotFoundError:
        return False


def open_plain(path: pathlib.Path, flags: int) -> int:
    """Opens a file that is written in place: not through a link to somebody else's, nor for ever at a pipe.

    Args:
      path: the file.
      flags: of `os.open`.

    Returns:
      A descriptor.

    Raises:
      InputError: it is a link, a pipe, a device or a folder.
      OSError: the system does not open it.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _not_plain(path) from error
        raise
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise _not_plain(path)


def _not_plain(path: pathlib.Path) -> InputError:
    return InputError(f"{str(path)!r} is a link, a pipe or a folder, where a file is to lie; move it away")


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes JSON, whole or not at all; NaN raises `ValueError`."""
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: pathlib.Path) -> Any:
    """Reads JSON.

    Args:
      path: the file.

    Returns:
      What it holds.

    Raises:
      InputError: it is a pipe, or not JSON, or nested beyond reason.
      OSError: the system does not read it.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise _not_plain(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise InputError(f"{path} is not JSON ({reason})") from error


def write_csv(path: pathlib.Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a table, whole or not at all; None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def write_npz(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as a compressed npz file, whole or not at all."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomically(path, buffer.getvalue())


def read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads every array of an npz file.

    Args:
      path: the file.

    Returns:
      Its arrays by name.

    Raises:
      InputError: it is damaged, cut short, holds pickled objects, or unpacks to more than this machine can hold.
      OSError: the system does not read it, which says nothing of what it holds; as little as a `MemoryError`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            check_members(archive, "it")
            return {name.removesuffix(".npy"): read_member(archive, name) for name in archive.namelist()}
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (*DAMAGE, OSError) as error:
        # A place before the beginning of the file, which a damaged archive may name, is the system's complaint too.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise InputError(f"{str(path)!r} is damaged ({type(error).__name__})") from error


def check_members(archive: zipfile.ZipFile, what: object) -> None:
    """Refuses an archive that takes more memory than this host has, by what it says, or by how it may be packed.

    Args:
      archive: npz, or a zipped table.
      what: the file, for the message.

    Raises:
      InputError: it is too large, or packed in another way than NumPy and every zip program do it: a block of bzip2 or
        LZMA unpacks whole before the first byte is to be had, whatever its directory says.
    """
    for member in archive.infolist():
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            way = _WAYS.get(member.compress_type, f"way {member.compress_type}")
            raise InputError(f"{what} is packed by {way}; pack it by deflate, as zip programs do")
    check_unpacked(what, sum(member.file_size for member in archive.infolist()))


def read_member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Reads an array of an npz file whose members were checked.

    Args:
      archive: the npz file.
      name: of the member.

    Returns:
      The array.

    Raises:
      InputError: it holds objects, which would be unpickled.
      ValueError: it is no array, or is said to be larger than it is; see `DAMAGE` for what else damage raises.
    """
    stream = io.BytesIO()
    with archive.open(name) as packed:  # what it unpacks to is cut where its directory says, block by block
        shutil.copyfileobj(packed, stream)  # the end of the member verifies its checksum before NumPy parses anything
    size = stream.tell()
    stream.seek(0)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        version = (2, 0)  # 3.0 differs in the encoding of names of fields only, and plain arrays have none
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    if dtype.hasobject:
        raise InputError(
            f"key `{name.removesuffix('.npy')}` holds pickled objects, which are not read; store plain numbers or text"
        )
    if stream.tell() + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{name} is no array of shape {shape}")
    stream.seek(0)
    return np.lib.format.read_array(stream, allow_pickle=False)
