"""In: a run in a process that is killed, stopped, or finds no room. Out: the run that nobody disturbed, bit for bit.

The faults are those of docs/faults.md; each is done, not imitated.
"""

import json
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.faults import worker
from tests.runs import without_seconds

pytestmark = pytest.mark.slow
_ROOT = pathlib.Path(__file__).resolve().parents[2]
_SERVER = multiprocessing.get_context("forkserver")  # whose processes need not import JAX again
_SERVER.set_forkserver_preload(["tests.faults.worker"])
_ROUNDS = 2
# What the folder of a run gets, in order; a kill comes while it waits for one of them.
_PARTS = (
    *("config.json", "methods/last_value_0.npz", "residual_autoregression", "boosted_trees", "pooled", "zoo"),
    *("hypernetwork", "generated", "methods/gpdiff_posterior_few_shot_0.npz", "metrics.json"),
)


@pytest.fixture(scope="module", name="whole")
def _whole(data_dir, tmp_path_factory) -> pathlib.Path:
    """The run that nobody disturbed, made as the others are."""
    folder = tmp_path_factory.mktemp("faults") / "whole"
    process = _forked(folder, data_dir)
    process.join(300)
    assert process.exitcode == 0
    return folder


def _forked(*arguments: Any):
    process = _SERVER.Process(target=worker.work, args=arguments)
    process.start()
    return process


def _started(folder: pathlib.Path, cities: pathlib.Path, *methods: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.faults.worker", str(folder), str(cities), *methods]
    return subprocess.Popen(command, cwd=_ROOT, stderr=subprocess.PIPE, text=True)


def _wait_for(found: Callable[[], bool], alive: Callable[[], bool]) -> None:
    limit = time.monotonic() + 200
    while not found() and alive() and time.monotonic() < limit:
        time.sleep(0.002)
    assert found(), "the process ended before, or took too long"


def _assert_same(folder: pathlib.Path, whole: pathlib.Path) -> None:
    made, want = (without_seconds(json.loads((one / "metrics.json").read_text())) for one in (folder, whole))
    assert made == want
    names = sorted(path.name for path in (whole / "methods").iterdir())
    assert sorted(path.name for path in (folder / "methods").iterdir()) == names
    for name in names:
        with np.load(folder / "methods" / name) as one, np.load(whole / "methods" / name) as other:
            np.testing.assert_array_equal(one["forecast"], other["forecast"], err_msg=name)
    assert _held(folder) == _held(whole)


def _held(folder: pathlib.Path) -> list[str]:
    """The names of all that a folder and the folders in it hold."""
    return sorted(str(path.relative_to(folder)) for pattern in ("*", "*/*") for path in folder.glob(pattern))


def _assert_ends_well(process: subprocess.Popen) -> None:
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said[-3000:]


def _error(process: subprocess.Popen) -> str:
    """The one line that a process ended with after its progress."""
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in said, said[-3000:]
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert said.splitlines()[-1:] == errors
    return errors[0]


def test_kills_in_every_stage_change_nothing(whole, data_dir, tmp_path):
    moments, kills = random.Random(0), 0
    for turn in range(_ROUNDS):
        folder = tmp_path / str(turn)
        for before in (None, *_PARTS[:-1]):
            process = _forked(folder, data_dir)
            if before is not None:
                _wait_for((folder / before).exists, process.is_alive)
            time.sleep(moments.uniform(0.0, 0.4))
            process.kill()
            process.join(60)
            kills += process.exitcode == -signal.SIGKILL
        process = _forked(folder, data_dir)
        process.join(300)
        assert process.exitcode == 0
        _assert_same(folder, whole)
    assert kills >= 16


def test_a_kill_before_every_kind_of_change_leaves_nothing_behind(whole, data_dir, tmp_path):
    """Random moments hardly ever fall between a stage that is written and what is cleared away after it."""
    folder, known, deaths = tmp_path / "run", tmp_path / "known", 0
    while True:
        process = _forked(folder, data_dir, ("default",), known)
        process.join(300)
        if process.exitcode != -signal.SIGKILL:
            break
        deaths += 1
        assert len(known.read_text().splitlines()) == deaths
    assert process.exitcode == 0 and deaths >= 25
    changes = known.read_text()
    for one in (
        "os.rename hypernetwork",
        "os.rmdir hypernetwork.checkpoints",
        "os.rename zoo",
        "os.rename metrics.json",
    ):
        assert f"{one}\n" in changes
    for one in ("os.rename checkpoints/pooled/#", "shutil.rmtree checkpoints/pooled/#.removed", "os.rmdir checkpoints"):
        assert f"{one}\n" in changes
    _assert_same(folder, whole)


def test_a_run_that_is_asked_to_end_ends_with_its_code_and_goes_on(whole, data_dir, tmp_path):
    folder = tmp_path / "run"
    process = _started(folder, data_dir)
    _wait_for((folder / "zoo.partial").exists, lambda: process.poll() is None)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said.splitlines()[-1]) == (143, "terminated")
    _assert_ends_well(_started(folder, data_dir))
    _assert_same(folder, whole)


def test_a_second_run_in_a_folder_is_refused_at_once_and_the_first_does_not_notice(whole, data_dir, tmp_path):
    folder = tmp_path / "run"
    first = _started(folder, data_dir)
    _wait_for((folder / "config.json").exists, lambda: first.poll() is None)
    begin = time.monotonic()
    said = _error(_started(folder, data_dir))
    assert f"is in use by another run (process {first.pid} on " in said and time.monotonic() - begin < 60
    _assert_ends_well(first)
    _assert_same(folder, whole)


@pytest.fixture(name="small_disk")
def _small_disk(tmp_path) -> Iterator[Callable[[str], pathlib.Path]]:
    """A file system of its own, made or changed by the options of a mount."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> pathlib.Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"a file system of its own needs root: {done.stderr.strip()}")
        return place

    yield mount
    subprocess.run(["umount", "--lazy", str(place)], capture_output=True, check=False)


def test_a_full_disk_is_one_line_and_with_room_the_run_goes_on(whole, data_dir, small_disk):
    folder = small_disk("size=60k") / "run"
    for size in ("60k", "100k", "400k", "900k"):
        small_disk(f"remount,size={size}")
        process = _started(folder, data_dir)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 2 and "Traceback" not in said, said[-3000:]
        assert said.splitlines()[-1].startswith("error: no space left on device")
        assert "free some, or write elsewhere" in said
    small_disk("remount,size=400m")
    _assert_ends_well(_started(folder, data_dir))
    _assert_same(folder, whole)


def test_a_folder_that_turns_read_only_is_one_line(data_dir, small_disk):
    folder = small_disk("size=100m") / "run"
    _assert_ends_well(_started(folder, data_dir, "last_value"))
    held = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    small_disk("remount,ro")
    said = _error(_started(folder, data_dir))
    assert str(folder) in said and "read-only file system" in said.lower()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == held


def test_a_flipped_bit_is_never_a_wrong_result(whole, data_dir, tmp_path):
    """Of a finished stage: refused by name, or as if it had not been there."""
    moments = random.Random(1)
    want = without_seconds(json.loads((whole / "metrics.json").read_text()))
    for turn, stage in enumerate(("pooled", "zoo", "hypernetwork", "generated", "methods")):
        folder = tmp_path / str(turn)
        shutil.copytree(whole, folder)
        (folder / "metrics.json").unlink()
        if stage != "methods":
            shutil.rmtree(folder / "methods")
        largest = max((folder / stage).rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
        content = bytearray(largest.read_bytes())
        content[moments.randrange(len(content))] ^= 1 << moments.randrange(8)
        largest.write_bytes(content)
        process = _started(folder, data_dir)
        _, said = process.communicate(timeout=200)
        if process.returncode == 0:
            assert without_seconds(json.loads((folder / "metrics.json").read_text())) == want
        else:
            assert process.returncode == 2 and f"{os.sep}{stage}" in said.splitlines()[-1]
            assert "is damaged" in said.splitlines()[-1] and "Traceback" not in said
            shutil.rmtree(folder / stage)
            _assert_ends_well(_started(folder, data_dir))
        _assert_same(folder, whole)
