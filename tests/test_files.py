"""In: a process killed while it writes a file. Out: the file as it was, and nothing of the killed one for long."""

import os
import subprocess
import sys

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
    dead = left.name.rpartition("-")[2].partition(".")[0]
    of_living = left.with_name(left.name.replace(f"-{dead}.", f"-{os.getpid()}."))
    of_living.write_bytes(b"still being written")
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second"
    assert sorted(tmp_path.iterdir()) == sorted([path, of_living, left_of_other])
