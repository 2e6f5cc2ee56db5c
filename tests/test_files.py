"""In: a process killed while it writes a file. Out: the file as it was, and nothing of the killed one for long."""

import fcntl
import os
import subprocess
import sys
import tempfile

from gpdiff_jax.files import write_atomically

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
