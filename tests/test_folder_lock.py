"""In: two processes and one folder. Out: the second is refused while the first lives, and not a moment longer."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import jax
import pytest

import gpdiff_jax as gpd
from gpdiff_jax.errors import InputError
from gpdiff_jax.folder_lock import lock_folder, locked_folder, refuse_if_locked, unlock_folder
from gpdiff_jax.run.folder import claim_folder

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_HOLD = """
import pathlib, sys, time
from gpdiff_jax.folder_lock import lock_folder
lock_folder(pathlib.Path(sys.argv[1]), outside=len(sys.argv) > 2)
print("held", flush=True)
time.sleep(60)
"""


def test_another_process_is_named_and_a_killed_one_leaves_no_lock(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    command = [sys.executable, "-c", _HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            words = rf"is in use by another run \(process {other.pid} on .* since .*\); wait for it to end, or name"
            with pytest.raises(InputError, match=words):
                lock_folder(tmp_path)
            with pytest.raises(InputError, match=words):
                claim_folder(str(tmp_path), "mark", "run")
            with pytest.raises(InputError, match=re.escape(f"process {other.pid}")):
                refuse_if_locked(tmp_path)
        finally:
            other.send_signal(signal.SIGKILL)
        other.wait()
    assert (tmp_path / ".lock").exists()
    refuse_if_locked(tmp_path)
    lock_folder(tmp_path)


def test_one_process_may_come_back_to_its_folder_and_to_a_new_one_of_its_name(tmp_path):
    folder = tmp_path / "run"
    for _ in range(2):
        folder.mkdir()
        for _ in range(2):
            lock_folder(folder)
        shutil.rmtree(folder)
    refuse_if_locked(folder)
    assert not folder.exists()


def test_a_lock_that_is_given_back_is_free_for_others(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    code = _HOLD.replace("time.sleep(60)", "")

    def other() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)

    with locked_folder(tmp_path):
        with locked_folder(tmp_path):
            pass
        assert "is in use by another run" in other().stderr
    assert other().stdout == "held\n"
    for _ in range(2):
        lock_folder(tmp_path)
    refuse_if_locked(tmp_path)
    unlock_folder(tmp_path)
    assert "is in use by another run" in other().stderr
    unlock_folder(tmp_path)
    unlock_folder(tmp_path)
    assert other().stdout == "held\n"


@pytest.mark.parametrize("outside", [False, True], ids=["harvest", "generator"])
def test_the_librarys_folders_are_one_process_at_a_time(tmp_path, simulated_cities, outside):
    folder, key = tmp_path / "kept", jax.random.key(0)
    folder.mkdir()
    command = [sys.executable, "-c", _HOLD, str(folder), *(["outside"] if outside else [])]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    harvest = {
        "model": "tiny",
        "key": key,
        "data": gpd.DataConfig(variants=2, max_neighbours=2),
        "pooled": gpd.PooledConfig(steps=1, regions=2, windows=1, evaluations=1),
        "config": gpd.HarvestConfig(steps=1, evaluate_every=1, windows=1, snapshots=1, anchor_windows=0),
    }
    zoo = gpd.harvest_cities(simulated_cities[:2], **harvest) if outside else None
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            with pytest.raises(InputError, match=rf"kept' is in use by another run \(process {other.pid}"):
                if zoo is None:
                    gpd.harvest_cities(simulated_cities[:2], **harvest, folder=folder)
                else:
                    gpd.pretrain(zoo, key=key, folder=folder)
        finally:
            other.send_signal(signal.SIGKILL)
    assert [path.name for path in folder.iterdir()] == ([] if outside else [".lock"])


@pytest.mark.parametrize("what", ["link", "dangling", "pipe", "folder"])
def test_what_is_no_lock_is_neither_written_nor_waited_for(tmp_path, what):
    precious, path = tmp_path / "precious", tmp_path / "run" / ".lock"
    precious.write_text("mine")
    path.parent.mkdir()
    {
        "link": lambda: path.symlink_to(precious),
        "dangling": lambda: path.symlink_to(tmp_path / "new"),
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
    }[what]()
    for call in (lock_folder, refuse_if_locked):
        with pytest.raises(InputError, match=r"run/.lock' is a link, a pipe or a folder, where .*; move it away"):
            call(path.parent)
    assert precious.read_text() == "mine" and not (tmp_path / "new").exists()
