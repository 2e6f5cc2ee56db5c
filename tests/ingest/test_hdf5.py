"""In: pandas frames in HDF5, some of which name other files or are larger than memory. Out: readings, or one line."""

import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from gpdiff_jax.errors import InputError
from gpdiff_jax.ingest import confined, read_series

h5py = pytest.importorskip("h5py")

_VALUES = np.arange(144.0).reshape(72, 2)


def _write(path: pathlib.Path) -> pathlib.Path:
    times = np.datetime64("2024-05-01", "ns") + np.arange(72) * np.timedelta64(1, "h")
    with h5py.File(path, "w") as file:
        frame = file.create_group("df")
        frame["axis0"], frame["axis1"] = np.array([b"a", b"b"]), times.astype(np.int64)
        frame["block0_items"], frame["block0_values"] = np.array([b"a", b"b"]), _VALUES
    return path


def _linked(file: Any, other: pathlib.Path) -> None:
    file["df"] = h5py.ExternalLink(str(other), "/df")


def _soft(file: Any, other: pathlib.Path) -> None:
    file["x"] = h5py.ExternalLink(str(other), "/df")
    file["df"] = h5py.SoftLink("/x")


def _external(file: Any, other: pathlib.Path) -> None:
    file["df"].create_dataset("block0_values", shape=(72, 2), dtype="f8", external=[(str(other), 0, 72 * 2 * 8)])


def _virtual(file: Any, other: pathlib.Path) -> None:
    layout = h5py.VirtualLayout((72, 2), "f8")
    layout[:] = h5py.VirtualSource(str(other), "df/block0_values", (72, 2))
    file["df"].create_virtual_dataset("block0_values", layout)


@pytest.mark.parametrize("change", [_linked, _soft, _external, _virtual])
def test_what_lies_in_another_file_is_not_followed(tmp_path, change):
    other, path = _write(tmp_path / "other.h5"), _write(tmp_path / "x.h5")
    np.testing.assert_array_equal(read_series(path).values, _VALUES)
    with h5py.File(path, "a") as file:
        del file["df" if change in (_linked, _soft) else "df/block0_values"]
        change(file, other)
        found = file["df/block0_values"][()]  # it is there for whoever follows
    assert found.shape == (72, 2)
    said = "it says that 'block0_values' lies elsewhere, which is not followed"
    with pytest.raises(
        InputError, match=rf"x\.h5: ({said}|it holds .*; a pandas frame in fixed form is needed, within)"
    ):
        read_series(path)


def test_a_name_with_a_slash_leads_nowhere(tmp_path):
    """No file that HDF5 writes has one; who changes its bytes can make a path out of a name."""
    other, path = _write(tmp_path / "other.h5"), _write(tmp_path / "x.h5")
    with h5py.File(other, "a") as file:
        file["b_values"], file["b_items"] = np.full((72, 1), 42.0), np.array([b"b"])
    with h5py.File(path, "a") as file:
        file["df"]["e"] = h5py.ExternalLink(str(other), "/")
        file["df"]["eXb_values"] = np.zeros(1)
    content = path.read_bytes()
    assert content.count(b"eXb_values") == 1
    path.write_bytes(content.replace(b"eXb_values", b"e/b_values"))
    with pytest.raises(InputError, match=r"x\.h5: it says that 'e/b_[a-z]+' lies elsewhere"):
        read_series(path)


def test_links_beside_the_frame_do_no_harm(tmp_path):
    path = _write(tmp_path / "x.h5")
    with h5py.File(path, "a") as file:
        file["latest"], file["a\nb"] = h5py.SoftLink("/df"), 1
    np.testing.assert_array_equal(read_series(path).values, _VALUES)
    with h5py.File(path, "a") as file:
        del file["df"]
    with pytest.raises(InputError, match=r"x\.h5: it holds 'a\\nb', 'latest'; a pandas frame"):
        read_series(path)


def test_packages_of_this_process_are_those_of_the_worker_and_limits_of_the_system_stay(tmp_path):
    """As where packages are found by PYTHONPATH, and memory is limited for all."""
    code = (
        "import pathlib, resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36)); "
        "from gpdiff_jax.ingest.confined import read_confined; "
        "print(len(read_confined('hdf5', pathlib.Path(sys.argv[1]))))"
    )
    place = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PATH": os.environ["PATH"]}
    python = [os.path.realpath(sys.executable), "-c", code, str(_write(tmp_path / "x.h5"))]  # knows no environment
    done = subprocess.run(python, env=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and int(done.stdout) > 2000, done.stderr


@pytest.mark.parametrize(("name", "shape"), [("block0_values", (72, 10**9)), ("axis1", (3 * 10**10,))])
def test_a_small_file_of_a_frame_without_end_is_refused(tmp_path, monkeypatch, name, shape):
    path = _write(tmp_path / "x.h5")
    with h5py.File(path, "a") as file:
        del file["df"][name]
        file["df"].create_dataset(name, shape=shape, dtype="i8", chunks=(1,) * (len(shape) - 1) + (1000,))
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(confined, "host_bytes", lambda: 2**34)
    with pytest.raises(InputError, match=r"x\.h5: it takes more than the memory that is free on this machine"):
        read_series(path)


def test_a_frame_is_as_large_as_its_index_and_columns_say_whatever_its_blocks_hold(tmp_path, monkeypatch):
    path = _write(tmp_path / "x.h5")
    monkeypatch.setattr(confined, "host_bytes", lambda: 2 * (72 * 8 + 2 + 3 * 72 * 2 * 8 + 2 + 72 * 2 * 8))
    read_series(path)
    with h5py.File(path, "a") as file:
        del file["df/axis0"]
        file["df/axis0"] = np.arange(500)
    with pytest.raises(InputError, match="more than the memory that is free"):
        read_series(path)


def test_objects_are_not_read(tmp_path):
    path = _write(tmp_path / "x.h5")
    with h5py.File(path, "a") as file:
        del file["df/axis0"]
        file["df"].create_dataset("axis0", data=["a", "b"], dtype=h5py.string_dtype())
    with pytest.raises(InputError, match=r"x\.h5: it holds objects in 'axis0'; a pandas frame of numbers"):
        read_series(path)


@pytest.mark.parametrize(("name", "value"), [("tz", "Europe/Nowhere"), ("kind", "integer")])
def test_an_index_of_another_kind_or_zone_is_named(tmp_path, name, value):
    path = _write(tmp_path / "x.h5")
    with h5py.File(path, "a") as file:
        file["df/axis1"].attrs[name] = value
    with pytest.raises(InputError, match=rf"x\.h5 has (times of the zone|an index of) '{value}'"):
        read_series(path)


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("while True: pass", r"it is not read after 1 s"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", r"exit code -11"),
        ("raise ValueError('first\\nsecond')", r"second"),
        ("print('no npz')", r"ValueError|UnpicklingError|BadZipFile"),
    ],
)
def test_a_file_on_which_the_library_hangs_or_dies_is_one_line(tmp_path, monkeypatch, does, said):
    """As HDF5 2.0 does on some files whose bytes were changed."""
    (tmp_path / "worker.py").write_text(does)
    monkeypatch.setattr(confined, "_WORKER", tmp_path / "worker.py")
    monkeypatch.setattr(confined, "_PATIENCE", 1.0)
    with pytest.raises(InputError, match=rf"x\.h5 cannot be read as h5 \(({said})\); check the file"):
        read_series(_write(tmp_path / "x.h5"))
