"""In: a file whose library may hang, die or take all memory over it. Out: what it holds, or one line."""

import os
import pathlib
import subprocess
import sys

from gpdiff_jax.errors import InputError
from gpdiff_jax.host_memory import host_bytes
from gpdiff_jax.ingest.confined_worker import REFUSED

_WORKER = pathlib.Path(__file__).with_name("confined_worker.py")
_PATIENCE = 60.0  # seconds that any file may take; and a second for each of so many bytes
_BYTES_A_SECOND = 2**20
_HELD = {"hdf5": 2, "parquet": 1}  # times that what was read is in memory: what is handed over is there twice


def read_confined(kind: str, path: pathlib.Path) -> bytes:
    """Reads a file in a process of its own, which takes no more memory than is free.

    Args:
      kind: "hdf5" or "parquet".
      path: the file.

    Returns:
      What `confined_worker` writes.

    Raises:
      InputError: the file is refused or damaged, or its library dies or is not done after a minute, and a second for
        every MiB.
    """
    free = host_bytes()
    patience = _PATIENCE + path.stat().st_size / _BYTES_A_SECOND
    most = 2**62 if free is None else free // _HELD[kind]
    words = [kind, str(path.absolute()), str(most), str(round(patience) + 1)]
    # The packages of this process, wherever they come from; not the worker's folder, with modules of this library.
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(_WORKER), *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=surroundings,
            timeout=patience,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise damaged(path, f"it is not read after {patience:.0f} s") from None
    said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
    if done.returncode == 1 and said and said[0].startswith(REFUSED):
        raise InputError(f"{path}: {said[0].removeprefix(REFUSED)}")
    if done.returncode:
        raise damaged(path, said[0][:160] if said and done.returncode == 1 else f"exit code {done.returncode}")
    return done.stdout


def damaged(path: pathlib.Path, why: str) -> InputError:
    """What to say of a file that cannot be read, and why."""
    return InputError(
        f"{path} cannot be read as {path.suffix.lstrip('.')} ({why}); check the file, or download it again"
    )
