"""In: a process killed while it writes a file, and archives without end. Out: the file as it was, and one line."""

import errno
import fcntl
import os
import pathlib
import subprocess
import sys
import tempfile
import tracemalloc
import zipfile

import numpy as np
import pytest

from gpdiff_jax import host_memory
from gpdiff_jax.errors import InputError
from gpdiff_jax.files import read_npz, write_atomically
from gpdiff_jax.ingest import read_matrix_file

_KILLED = """
import os, pathlib, signal, sys
from gpdiff_jax.files import write_atomically
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
write_atomically(pathlib.Path(sys.argv[1]), b"half")
"""


def test_what_a_killed_writer_left_goes_when_that_file_is_written_and_no_other(tmp_path):
    path, other = tmp_path / "made.npz", tmp_path / "made.npz.old"
    path.write_bytes(b"first")
    for place in (path, other):
        assert subprocess.run([sys.executable, "-c", _KILLED, str(place)], check=False).returncode == -9
    left, left_of_other = sorted(tmp_path.glob(".*.partial"), key=lambda one: ".old." in one.name)
    assert path.read_bytes() == b"first" and left.read_bytes() == b"half"
    living = tmp_path / ".made.npz.abc.partial"
    with living.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as who still writes holds it
        write_atomically(path, b"second")
        assert path.read_bytes() == b"second"
        assert sorted(tmp_path.iterdir()) == sorted([path, living, left_of_other])
    write_atomically(path, b"third")
    assert sorted(tmp_path.iterdir()) == sorted([path, left_of_other])


def test_a_place_that_cannot_be_written_is_named_as_it_was_given(tmp_path, monkeypatch):
    def refused(**words):
        raise PermissionError(errno.EACCES, "Permission denied", f"{words['dir']}/{words['prefix']}abc")

    monkeypatch.setattr(tempfile, "mkstemp", refused)
    with pytest.raises(PermissionError) as raised:
        write_atomically(tmp_path / "made.npz", b"content")
    assert raised.value.filename == str(tmp_path / "made.npz")


def test_a_pipe_that_is_named_as_what_a_writer_leaves_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / ".made.npz.abc.partial")
    write_atomically(tmp_path / "made.npz", b"content")
    assert (tmp_path / "made.npz").read_bytes() == b"content"


def test_a_file_has_the_permissions_that_the_process_gives(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "made.npz", b"content")
    finally:
        assert os.umask(before) == 0o027
    assert (tmp_path / "made.npz").stat().st_mode & 0o777 == 0o640


def test_who_loses_its_file_before_it_is_locked_takes_another(tmp_path, monkeypatch):
    made, make = [], tempfile.mkstemp

    def lost_once(**words):
        handle, name = make(**words)
        made.append(name)
        if len(made) == 1:
            os.unlink(name)
        return handle, name

    monkeypatch.setattr(tempfile, "mkstemp", lost_once)
    write_atomically(tmp_path / "made.npz", b"content")
    assert len(made) == 2 and [path.name for path in tmp_path.iterdir()] == ["made.npz"]


def test_an_archive_that_unpacks_to_more_than_memory_is_refused_unread(tmp_path, monkeypatch):
    path = tmp_path / "made.npz"
    np.savez_compressed(path, a=np.zeros(200_000))
    assert path.stat().st_size < 5000
    assert read_npz(path)["a"].shape == (200_000,)
    monkeypatch.setattr(host_memory, "host_bytes", lambda: 2**20)
    with pytest.raises(InputError, match=r"made.npz: it takes 2 MiB, more than the 1 MiB of memory that are free"):
        read_npz(path)


def test_a_sparse_matrix_without_end_is_refused(tmp_path):
    path = tmp_path / "adj.npz"
    count = 3_000_000
    none = np.zeros(0, np.int32)
    words = {"format": np.array("csr"), "shape": np.array([count, count]), "data": np.zeros(0), "indices": none}
    np.savez_compressed(path, allow_pickle=False, **words, indptr=np.zeros(count + 1, np.int32))
    with pytest.raises(InputError, match=r"adj.npz takes 67055.2 GiB, more than the \d+\.\d GiB of memory"):
        read_matrix_file(path)


_WRAPPED = np.array([0, 3_000_000_000, 10], np.uint32)


@pytest.mark.parametrize("ends", [_WRAPPED, np.array([-1, 4, 9]), np.array([0, 5, 9.9])])
def test_a_sparse_matrix_whose_rows_end_before_they_begin_is_refused_unmade(tmp_path, ends):
    words = {"format": np.array("csr"), "shape": np.array([2, 2]), "data": np.ones(10)}
    np.savez(tmp_path / "adj.npz", allow_pickle=False, **words, indices=np.zeros(10, np.int32), indptr=ends)
    with pytest.raises(InputError, match=r"adj.npz is a damaged sparse matrix"):
        read_matrix_file(tmp_path / "adj.npz")


@pytest.mark.parametrize("way", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_archive_that_unpacks_whole_before_its_first_byte_is_refused(tmp_path, way):
    with zipfile.ZipFile(tmp_path / "made.npz", "w", way) as archive, archive.open("a.npy", "w") as member:
        np.lib.format.write_array(member, np.zeros(200_000))
    with pytest.raises(InputError, match=r"made.npz: it is packed by (bzip2|LZMA); pack it by deflate"):
        read_npz(tmp_path / "made.npz")


def _forge(path: pathlib.Path, size: int, said: int) -> None:
    """Writes another size of the only member into the directory of an archive."""
    content = bytearray(path.read_bytes())
    place = content.rindex(b"PK\x01\x02") + 24
    assert int.from_bytes(content[place : place + 4], "little") == size
    content[place : place + 4] = said.to_bytes(4, "little")
    path.write_bytes(content)


def test_a_directory_that_says_too_little_of_a_member_is_believed_and_no_more_is_unpacked(tmp_path):
    path = tmp_path / "made.npz"
    np.savez_compressed(path, a=np.zeros(40_000_000))
    _forge(path, 320_000_128, 1000)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"made.npz' is damaged"):
        read_npz(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000


@pytest.mark.parametrize(
    "content",
    [
        b"hello",
        b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (1152921504606846976,)}"
        + b" " * 46
        + b"\n",
    ],
)
def test_a_member_that_is_no_array_or_says_it_is_larger_than_it_is_is_damage(tmp_path, content):
    with zipfile.ZipFile(tmp_path / "made.npz", "w") as archive:
        archive.writestr("a.npy", content)
    with pytest.raises(InputError, match=r"made.npz' is damaged \(ValueError\)"):
        read_npz(tmp_path / "made.npz")
