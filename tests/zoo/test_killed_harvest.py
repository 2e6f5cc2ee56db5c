"""In: a harvest in a process of its own. Out: the same zoo, bit for bit, however often the process is killed."""

import pathlib
import random
import signal
import subprocess
import sys
import time

import chex
import numpy as np
import pytest

from gpdiff_jax.zoo.parameter_zoo import finished_chunks, load_zoo

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_KILLS = 5


def _start(folder: pathlib.Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.harvest_worker", str(folder)]
    return subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True)


def _wait(process: subprocess.Popen) -> int:
    process.communicate(timeout=300)
    return process.returncode


@pytest.mark.slow
def test_a_harvest_killed_at_any_moment_goes_on_to_the_same_bits(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert _wait(_start(whole)) == 0

    moments = random.Random(0)
    found = [0]
    for _ in range(_KILLS):
        process = _start(killed)
        assert process.stdout is not None and process.stdout.readline() == "harvesting\n"
        limit = time.monotonic() + 60
        while process.poll() is None and len(finished_chunks(killed)) == found[-1] and time.monotonic() < limit:
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 0.3))  # in the middle of a chunk, or of its writing
        process.send_signal(signal.SIGKILL)
        if _wait(process) == 0:  # it was done before
            break
        found.append(len(finished_chunks(killed)))
        assert found[-1] >= found[-2]  # what was finished is not lost
    assert len(found) > 3, f"chunks found after each kill: {found}; kill earlier"
    assert _wait(_start(killed)) == 0

    want, have = load_zoo(whole), load_zoo(killed)
    assert have.names == want.names and len(want.names) == 16
    for name in ("validation_mae", "start_mae", "step", "seed", "data_window"):
        np.testing.assert_array_equal(getattr(have, name), getattr(want, name))
    chex.assert_trees_all_equal(have.params, want.params)
