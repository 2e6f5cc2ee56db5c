"""In: nested arrays and facts. Out: the same from disk, bit for bit; and one line about a folder that holds none."""

import errno
import gc
import json
import os
import pathlib
import random
import shutil

import jax
import numpy as np
import pytest

from gpdiff_jax import host_memory
from gpdiff_jax.errors import InputError
from gpdiff_jax.training.storage import load_arrays, save_arrays

_ARRAYS = {
    "layer": {"bias": np.array([np.float32(-0.0), np.float32(1e-42), np.float32(np.nan)]), "empty": {}},
    "count": np.arange(6, dtype=np.int32).reshape(2, 3),
    "channels": [np.ones((2, 1), np.float32), np.full((1,), 7.0, np.float32)],
}
_FACTS = {"format": 3, "names": ["a/b", "c"], "words": 'ü "quoted"'}


def test_arrays_and_facts_come_back_bit_for_bit(tmp_path):
    save_arrays(tmp_path / "made", _ARRAYS, _FACTS)
    arrays, facts = load_arrays(tmp_path / "made", 3, "thing")
    assert facts == _FACTS
    assert jax.tree.structure(arrays) == jax.tree.structure(_ARRAYS)
    for got, want in zip(jax.tree.leaves(arrays), jax.tree.leaves(_ARRAYS), strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        assert np.asarray(got).tobytes() == want.tobytes()
    # Only the finished folder is left.
    assert [entry.name for entry in tmp_path.iterdir()] == ["made"]


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_arrays(pathlib.Path("~/made"), _ARRAYS, _FACTS)
    assert (tmp_path / "made").is_dir() and load_arrays(pathlib.Path("~/made"), 3, "thing")[1] == _FACTS


def test_another_format_is_refused(tmp_path):
    save_arrays(tmp_path / "made", _ARRAYS, _FACTS)
    with pytest.raises(InputError, match=r"the thing at '.*made' has format 3, and this version reads 4; name another"):
        load_arrays(tmp_path / "made", 4, "thing")


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no thing at '.*absent'; name the folder that holds one"):
        load_arrays(tmp_path / "absent", 3, "thing")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match="no thing at"):
        load_arrays(tmp_path / "file", 3, "thing")


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_is_something_else_is_never_called_damaged(tmp_path):
    run = tmp_path / "run"
    save_arrays(run / "thing", _ARRAYS, _FACTS)
    (run / "metrics.json").write_text("{}")
    with pytest.raises(InputError, match=r"run' is no thing: it holds metrics.json, thing; did you mean '.*run/thing'"):
        load_arrays(run, 3, "thing")
    with pytest.raises(InputError, match=r"run' is no other: it holds metrics.json, thing; name the folder that holds"):
        load_arrays(run, 3, "other")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty' is no thing: it is empty; name the folder"):
        load_arrays(tmp_path / "empty", 3, "thing")


def test_memory_that_runs_out_says_nothing_of_a_folder(tmp_path, monkeypatch):
    save_arrays(tmp_path / "made", _ARRAYS, _FACTS)

    def load(place):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 70368744177664 bytes.")

    monkeypatch.setattr("gpdiff_jax.training.storage.ocp.load", load)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        load_arrays(tmp_path / "made", 3, "thing")


def test_a_folder_that_says_it_holds_more_than_memory_is_refused_unread(tmp_path, monkeypatch):
    save_arrays(tmp_path / "made", {"a": np.zeros((512, 1024), np.float32)}, _FACTS)
    monkeypatch.setattr(host_memory, "host_bytes", lambda: 2**20)
    monkeypatch.setattr("gpdiff_jax.training.storage.ocp.load", None)
    with pytest.raises(InputError, match=r"the thing at '.*made' takes 2 MiB, more than the 1 MiB of memory"):
        load_arrays(tmp_path / "made", 3, "thing")


def test_devices_that_are_not_there_say_nothing_of_a_folder(tmp_path, monkeypatch):
    save_arrays(tmp_path / "made", _ARRAYS, _FACTS)
    monkeypatch.setenv("JAX_PLATFORMS", "xyz")
    for error, reason in (
        (RuntimeError("Unable to\ninitialize"), "Unable to initialize"),
        (AssertionError(), "no such"),
    ):
        monkeypatch.setattr(jax, "devices", lambda error=error: (_ for _ in ()).throw(error))
        with pytest.raises(
            InputError, match=rf"JAX cannot use the devices .* \(=xyz\) names \({reason}.*; unset JAX_PL"
        ):
            load_arrays(tmp_path / "made", 3, "thing")


def test_a_full_disk_is_the_systems_own_error_with_the_place(tmp_path, monkeypatch):
    def save(place, arrays, **options):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing: OS error 28 No space left on device\nmany\nlines")

    monkeypatch.setattr("gpdiff_jax.training.storage.ocp.save", save)
    with pytest.raises(OSError) as raised:
        save_arrays(tmp_path / "made", _ARRAYS, _FACTS)
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path / "made"))


def test_a_flipped_bit_is_never_another_array(tmp_path):
    arrays = {"layer": np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32), "step": np.arange(3)}
    save_arrays(tmp_path / "made", arrays, _FACTS)
    moments, refused = random.Random(0), 0
    for turn in range(40):
        folder = tmp_path / str(turn)
        shutil.copytree(tmp_path / "made", folder)
        files = [path for path in _files(folder) if path.stat().st_size]
        path = max(files, key=lambda path: path.stat().st_size) if turn % 2 else moments.choice(files)
        content = bytearray(path.read_bytes())
        content[moments.randrange(len(content))] ^= 1 << moments.randrange(8)
        path.write_bytes(content)
        try:
            found, facts = load_arrays(folder, 3, "thing")
        except InputError as error:
            assert "is damaged" in str(error) or "has format" in str(error) or "is no thing" in str(error)
            refused += 1
        else:
            assert facts == _FACTS
            jax.tree.map(np.testing.assert_array_equal, found, arrays)
    assert refused >= 20


@pytest.mark.parametrize("damage", ["metadata", "truncate", "delete", "garble"])
def test_a_damaged_folder_is_one_line_that_names_it(tmp_path, damage):
    folder = tmp_path / "made"
    save_arrays(folder, {"layer": np.random.default_rng(0).normal(size=(64, 64))}, _FACTS)
    if damage == "metadata":
        for path in _files(folder):
            if "METADATA" in path.name.upper():
                path.write_text(json.dumps({}))
    else:
        # The file that holds the array's bytes.
        largest = max(_files(folder), key=lambda path: path.stat().st_size)
        if damage == "truncate":
            os.truncate(largest, largest.stat().st_size // 2)
        elif damage == "delete":
            largest.unlink()
        else:
            largest.write_bytes(b"\xff" * largest.stat().st_size)
    with pytest.raises(
        InputError, match=r"the thing at '.*made' is damaged \(\w+\); use a copy .* move it away"
    ) as raised:
        load_arrays(folder, 3, "thing")
    assert "\n" not in str(raised.value) and "delete" not in str(raised.value)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.9])
def test_of_many_arrays_cut_short_nothing_is_heard_but_the_line(tmp_path, capfd, caplog, kept):
    """Orbax ends at the first failure while others are on their way, whose threads have a lot to say."""
    save_arrays(tmp_path / "made", {str(k): np.arange(100.0) * k for k in range(60)}, _FACTS)
    for path in (tmp_path / "made").rglob("d/*"):
        content = path.read_bytes()
        path.write_bytes(content[: int(kept * len(content))])
    for _ in range(3):
        with pytest.raises(InputError, match=r"the thing at '.*made' is damaged"):
            load_arrays(tmp_path / "made", 3, "thing")
        gc.collect()
    assert capfd.readouterr().err == ""
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []
