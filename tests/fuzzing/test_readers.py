"""In: broken and hostile files. Out: readers read them, or say in one line why not; some that they failed on."""

import collections
import pathlib
import pickle
import random
import time
from typing import Any

import numpy as np
import pytest

import gpdiff_jax as gpd
from gpdiff_jax.files import read_npz
from gpdiff_jax.ingest import load_plain_pickle, read_matrix_file
from tests.fuzzing.folders import folder_readers
from tests.fuzzing.guided import feed_guided
from tests.fuzzing.readers import feed, readers

_NAMES = (
    *("city", "npz", "long_table", "wide_table", "zoned_table", "sites", "edges", "matrix", "series", "npy"),
    *("bare_table", "pickle", "metrics", "hdf5", "parquet"),
)


# Of folders; how many each reads in the fast tests. A page takes seconds; HDF5 and Parquet a process for every file.
_FOLDERS = {
    **{"hypernetwork": 60, "zoo": 60, "parameters": 60, "run": 60},
    **{"hypernetwork_folder": 20, "zoo_folder": 20, "checkpoint_folder": 20, "page": 0},
}
_INPUTS = _FOLDERS | {"hdf5": 20, "parquet": 20}


@pytest.fixture(scope="module", name="every")
def _every(tmp_path_factory, finished):
    folder = tmp_path_factory.mktemp("fuzzing")
    return folder, readers(folder) | folder_readers(finished[0], folder)


def test_all_readers_are_fed(every):
    assert set(every[1]) == {*_NAMES, *_FOLDERS}


@pytest.mark.parametrize("name", [*_NAMES, *(name for name, inputs in _FOLDERS.items() if inputs)])
def test_a_reader_reads_or_refuses_in_one_line(every, name):
    folder, made = every
    inputs = _INPUTS.get(name, 80)
    ends, wrong = feed(made[name], folder, random.Random(0), inputs, time.monotonic() + 60)
    assert sum(ends.values()) == inputs and wrong == {}
    # Some get past the parser, and some do not.
    assert min(ends.values()) > 0, ends


@pytest.mark.slow
@pytest.mark.parametrize("name", [*_NAMES, *_FOLDERS])
def test_a_reader_stands_many_files(every, name):
    folder, made = every
    ends, wrong = feed(made[name], folder, random.Random(1), 20_000, time.monotonic() + 3)
    assert sum(ends.values()) > (50 if _INPUTS.get(name, 60) >= 60 else 0) and wrong == {}


@pytest.mark.slow
def test_a_fuzzer_that_sees_what_it_reaches_grows_files(tmp_path):
    pytest.importorskip("atheris")
    ends, wrong = feed_guided("sites", tmp_path, 20, 3000, 0)
    assert ends["inputs"] >= 300 and ends["reached"] > 5 and wrong == {}


def test_readings_without_regions_and_ids_that_are_no_list(tmp_path, simulated_cities):
    gpd.save_city(tmp_path / "city.npz", simulated_cities[0])
    with np.load(tmp_path / "city.npz") as held:
        arrays: Any = dict(held)
    np.savez(tmp_path / "city.npz", **arrays | {"values": arrays["values"].ravel(), "node_ids": np.array("a")})
    with pytest.raises(gpd.InputError, match=r"city.npz: `adjacency` \(of shape \(8, 8\)\) must be \[N, N\]"):
        gpd.load_city(tmp_path / "city.npz")
    np.savez(tmp_path / "city.npz", **arrays | {"kind": np.array("x" * 5000)})
    with pytest.raises(gpd.InputError, match=r"`kind` \(='x{50,60}\.\.\.x{10,20}'\) \(\d+ characters\)") as raised:
        gpd.load_city(tmp_path / "city.npz")
    assert len(str(raised.value)) < 400


def test_an_archive_whose_directory_lies_before_its_beginning_is_damaged(tmp_path):
    np.savez(tmp_path / "made.npz", a=np.zeros(3))
    content = bytearray((tmp_path / "made.npz").read_bytes())
    size = int.from_bytes(content[-10:-6], "little")  # of the central directory, in the last record
    content[-10:-6] = (size + len(content)).to_bytes(4, "little")
    (tmp_path / "made.npz").write_bytes(content)
    with pytest.raises(gpd.InputError, match=r"made.npz' is damaged"):
        read_npz(tmp_path / "made.npz")


def _pickle(content: bytes, folder: pathlib.Path) -> pathlib.Path:
    (folder / "made.pkl").write_bytes(content)
    return folder / "made.pkl"


def test_a_small_pickle_takes_no_memory_without_end(tmp_path):
    for place in (b"r\xff\xff\xff\x7f", b"p2000000000\n"):
        with pytest.raises(gpd.InputError, match=r"made.pkl is a damaged pickle \(_Forged: place 2\d+ of \d+ bytes\)"):
            load_plain_pickle(_pickle(b"\x80\x02]" + place + b".", tmp_path))


def test_a_pickle_that_holds_one_thing_a_billion_times_is_read_in_no_time(tmp_path):
    nested = ["x"]
    for _ in range(60):
        nested = [nested, nested]
    found = load_plain_pickle(_pickle(pickle.dumps(nested), tmp_path))
    depth = 0
    while found != ["x"] and isinstance(found[0], list):
        assert found[0] is found[1]
        found, depth = found[0], depth + 1
    assert depth == 60
    endless: list = []
    endless.append(endless)
    with pytest.raises(gpd.InputError, match=r"made.pkl is a damaged pickle \(RecursionError"):
        load_plain_pickle(_pickle(pickle.dumps(endless), tmp_path))


_TWICE = b"2\x86" * 60  # a tuple of which each part holds the next twice
_KEYS = {
    "of tuples": b"})" + _TWICE + b"Ns.",
    "of remembered tuples": b"})" + b"q\x00h\x00\x86" * 60 + b"Ns.",
    "among others": b"}(" + b"NN)" + _TWICE + b"Nu.",
    "within tuples of any length": b"})" + b"q\x00(h\x00h\x00t" * 60 + b"Ns.",
    "very deep": b"})" + b"\x85" * 200_000 + b"Ns.",
    "of a set": b"\x8f()" + _TWICE + b"\x90.",
    "of a frozen set": b"()" + _TWICE + b"\x91.",
    "of nested frozen sets": b"})" + b"q\x00(h\x00h\x00\x85\x91" * 60 + b"Ns.",
    "of a set that is called": b"cbuiltins\nset\n(]()" + _TWICE + b"etR.",
    "of an ordered dict that is called": b"ccollections\nOrderedDict\n(](](" + b")" + _TWICE + b"NeetR.",
}


@pytest.mark.parametrize("name", _KEYS)
def test_a_small_pickle_whose_key_is_hashed_without_end_is_refused(tmp_path, name):
    with pytest.raises(gpd.InputError, match=r"made.pkl is a damaged pickle \(_Forged: a key of more than 64 parts"):
        load_plain_pickle(_pickle(_KEYS[name], tmp_path))


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_with_keys_of_some_parts_and_long_tuples_is_read(tmp_path, protocol):
    row = tuple(map(float, range(2000)))
    sets = [frozenset([(2, 3)]), {1, "a"}, collections.OrderedDict([("b", 1), ("a", 2)])]
    plain = {("a", (1, "b")): sets, (): {(4,): np.ones(2)}, "rows": (row,) * 1000, np.int64(3): {}}
    found = load_plain_pickle(_pickle(pickle.dumps(plain, protocol), tmp_path))
    assert found["a", (1, "b")] == sets and list(found["a", (1, "b")][2]) == ["b", "a"] and found[3] == {}
    assert found[()][4,].tolist() == [1, 1] and found["rows"] == plain["rows"]


def test_numbers_as_python_2_wrote_them_in_text(tmp_path):
    dtype = b"cnumpy\ndtype\n(S'f8'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
    number = b"cnumpy.core.multiarray\nscalar\n(" + dtype + rb"S'\x9a\x99\x99\x99\x99\x99\xb9?'" + b"\ntR."
    assert load_plain_pickle(_pickle(number, tmp_path)) == 0.1


def test_a_small_pickle_of_a_matrix_without_end_is_refused_before_it_is_made(tmp_path):
    row = [0.0] * 1000
    with pytest.raises(gpd.InputError, match=r"made.pkl holds list in row 1; a matrix of numbers"):
        read_matrix_file(_pickle(pickle.dumps([[row] * 1000] * 1000), tmp_path))
    with pytest.raises(gpd.InputError, match=r"made.pkl takes 74.5 GiB, more than the \d+\.\d GiB of memory"):
        read_matrix_file(_pickle(pickle.dumps([[0.0] * 100_000] * 100_000), tmp_path))
