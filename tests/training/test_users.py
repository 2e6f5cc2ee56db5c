"""In: everything that is trained by the loop, very small. Out: the same parameters on one device and on two, and after
kills.
"""

import pathlib
import shutil
import signal
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.users import USERS, prepare

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_LONG = [pytest.param(name, marks=pytest.mark.slow) for name in ("mlp", "encoder")]


@pytest.mark.parametrize("name", ["pooled", "denoiser", "embedding", *_LONG])
def test_one_device_and_two_train_the_same_parameters_in_float64(name, simulated_cities):
    cities = simulated_cities[:2]
    sources = prepare(cities)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        one, two = (USERS[name](cities, sources, 1, devices=jax.local_devices()[:count]) for count in (1, 2))
    for alone, shared in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert alone.dtype == jnp.float64
        np.testing.assert_allclose(shared, alone, rtol=0, atol=1e-9)


def test_a_training_goes_on_upon_another_number_of_devices(simulated_cities, tmp_path):
    cities, folder = simulated_cities[:2], tmp_path / "kept"
    train_it, sources = USERS["embedding"], prepare(cities)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        whole = train_it(cities, sources, 2, devices=jax.local_devices()[:1], checkpoints=folder)
        last = max(folder.iterdir(), key=lambda path: int(path.name))
        shutil.rmtree(last)
        gone_on = train_it(cities, sources, 2, devices=jax.local_devices(), checkpoints=folder)
    assert last.is_dir()
    chex.assert_trees_all_close(gone_on, whole, rtol=0, atol=1e-9)


def _start(folder: pathlib.Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "tests.training.worker", str(folder)], cwd=_ROOT)


def _finished_checkpoints(folder: pathlib.Path) -> int:
    return sum(path.name.isdigit() for path in folder.iterdir()) if folder.is_dir() else 0


@pytest.mark.slow
def test_every_training_that_is_killed_goes_on_to_the_same_bits(tmp_path):
    undisturbed = _start(tmp_path / "whole")
    for name in USERS:
        process = _start(tmp_path / "killed")
        limit = time.monotonic() + 200
        while _finished_checkpoints(tmp_path / "killed" / name) < 2 and time.monotonic() < limit:
            assert process.poll() is None, f"the worker ended before {name} was killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        assert not (tmp_path / "killed" / f"{name}.npz").exists(), f"{name} was over before it was killed"
        assert _finished_checkpoints(tmp_path / "killed" / name) >= 2
    assert _start(tmp_path / "killed").wait(timeout=200) == 0
    assert undisturbed.wait(timeout=200) == 0
    for name in USERS:
        with np.load(tmp_path / "whole" / f"{name}.npz") as want, np.load(tmp_path / "killed" / f"{name}.npz") as have:
            assert want.files == have.files and len(want.files) > 0
            for leaf in want.files:
                np.testing.assert_array_equal(have[leaf], want[leaf])
