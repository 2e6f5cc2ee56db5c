"""In: city files, whole, damaged and hostile. Out: the same city bit for bit, or one line that says what is wrong."""

import dataclasses
import io
import os
import pathlib
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gpdiff_jax import host_memory
from gpdiff_jax.cities import City, SimulationConfig, check_city, find_cities, load_city, save_city, simulate_cities
from gpdiff_jax.cities.city import KINDS, edges_of
from gpdiff_jax.errors import InputError

_DATA = os.environ.get("GPDIFF_DATA")
_TEXT = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=6)
_CITY = simulate_cities(SimulationConfig(cities=1, regions=5, days=2), seed=3)[0]


def _assert_identical(city: City, other: City) -> None:
    for field in dataclasses.fields(City):
        have, want = getattr(city, field.name), getattr(other, field.name)
        if isinstance(want, np.ndarray):
            assert (have.dtype, have.shape) == (want.dtype, want.shape), field.name
            assert have.tobytes() == want.tobytes(), field.name
        else:
            assert have == want and type(have) is type(want), field.name


def _arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


@st.composite
def _facts(draw) -> tuple[dict, np.ndarray]:
    steps, nodes, channels = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 2))
    kind = draw(st.sampled_from(KINDS))
    low = np.float32(1e-30) if kind == "speed" else np.float32(0)
    reading = st.floats(float(low), float(np.float32(3e38)), width=32)
    values = draw(hnp.arrays(np.float32, (steps, nodes, channels), elements=reading | st.just(float("nan"))))
    values[-1][np.isnan(values).all(axis=0)] = 1.0
    weight = st.just(0.0) | st.floats(0.0, 1.0, width=32)
    adjacency = draw(hnp.arrays(np.float32, (nodes, nodes), elements=weight))
    np.fill_diagonal(adjacency, 0.0)
    if nodes > 1 and not adjacency.any():
        adjacency[0, 1] = 1.0
    interval = draw(st.sampled_from([1, 5, 60, 720, 1440]))
    day = draw(st.none() | st.dates())
    start = None
    if day is not None:
        start = np.datetime64(day, "m") + np.timedelta64(interval * draw(st.integers(0, 1440 // interval - 1)), "m")
    degrees = hnp.arrays(np.float64, nodes, elements=st.floats(-90, 90))
    located = draw(st.booleans())
    points = draw(st.integers(0, 3))
    count = st.floats(-1e6, 1e6, width=32)
    facts = {
        "name": "town",
        "kind": kind,
        "values": values,
        "interval_minutes": interval,
        "start": start,
        "feature_names": tuple(draw(st.lists(_TEXT, min_size=channels, max_size=channels, unique=True))),
        "node_ids": tuple(draw(st.lists(_TEXT, min_size=nodes, max_size=nodes, unique=True))),
        "latitude": draw(degrees) if located else None,
        "longitude": draw(degrees) if located else None,
        "poi": draw(hnp.arrays(np.float32, (nodes, points), elements=count)) if points else None,
        "poi_names": tuple(draw(st.lists(_TEXT, min_size=points, max_size=points, unique=True))),
        "place": draw(st.just("") | _TEXT),
    }
    return facts, adjacency


@settings(max_examples=60, deadline=None)
@given(_facts())
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path_factory, drawn):
    facts, adjacency = drawn
    senders, receivers, weights = edges_of(adjacency)
    city = City(**facts, senders=senders, receivers=receivers, weights=weights)
    path = tmp_path_factory.mktemp("files") / "town.npz"
    save_city(path, check_city(city))
    _assert_identical(load_city(path), city)


def test_a_file_that_is_damaged_anywhere_is_refused_or_read_whole(tmp_path):
    path = tmp_path / "town.npz"
    save_city(path, _CITY)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for case in range(400):
        if case % 4 == 0:
            damaged = whole[: rng.integers(len(whole))]
        else:
            copy = bytearray(whole)
            # The directory at the end says how the rest is to be read, so half of the damage goes there.
            low = 0 if case % 2 else len(whole) * 3 // 4
            for position in rng.integers(low, len(whole), size=rng.integers(1, 4)):
                copy[position] = rng.integers(256)
            damaged = bytes(copy)
        path.write_bytes(damaged)
        try:
            city = load_city(path)
        except InputError as error:
            refused += 1
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            continue
        # A damaged directory can hide an optional key; what is read is never altered.
        optional = ("latitude", "longitude", "poi", "poi_names")
        hidden = {name: getattr(city, name) for name in optional if getattr(city, name) is None or name == "poi_names"}
        _assert_identical(check_city(city), dataclasses.replace(_CITY, name="town", **hidden))
    assert refused > 200


def test_hostile_headers_are_refused(tmp_path):
    path = tmp_path / "town.npz"
    save_city(path, _CITY)
    arrays = _arrays(path)
    headers = [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 5, 1)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 5, 1)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<f4'}",
        "{'descr': '<f4', 'fortran_order'",
        "(" * 500,
    ]
    for header in headers:
        text = (header + "\n").encode()
        member = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(64)
        with zipfile.ZipFile(path, "w") as archive:
            for key, array in arrays.items():
                stream = io.BytesIO()
                np.save(stream, array)
                archive.writestr(f"{key}.npy", member if key == "values" else stream.getvalue())
        with pytest.raises(InputError, match="pickled" if "|O" in header else "not a readable npz"):
            load_city(path)


class _Bomb:
    def __reduce__(self):
        return (pathlib.Path.touch, (pathlib.Path("exploded"),))


def test_pickles_are_never_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "town.npz"
    save_city(path, _CITY)
    np.savez(path, allow_pickle=True, **(_arrays(path) | {"node_ids": np.array([_Bomb()] * 5, dtype=object)}))
    with pytest.raises(InputError, match="`node_ids` holds pickled objects, which are not read"):
        load_city(path)
    path.write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(InputError, match="not a readable npz"):
        load_city(path)
    assert not (tmp_path / "exploded").exists()


def test_a_file_that_unpacks_beyond_the_bound_is_refused_unread(tmp_path, monkeypatch):
    path = tmp_path / "town.npz"
    save_city(path, _CITY)
    monkeypatch.setattr(host_memory, "host_bytes", lambda: 1000)
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(InputError, match=r"town.npz: the file takes 0 MiB, more than the 0 MiB"):
        load_city(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": None}, ["`kind` is missing"]),
        ({"adjacency": None}, ["`adjacency` is missing"]),
        ({"poi_names": None}, ["`poi_names`", "0 names", "4 names"]),
        ({"longitude": None}, ["`longitude` is missing"]),
        ({"values": np.array(["a"])}, ["`values`", "<U1", "real numbers"]),
        ({"values": np.full((48, 5, 1), 1e300)}, ["`values`", "infinite"]),
        ({"values": np.ones((48, 5))}, ["`values`", "(48, 5)"]),
        # The clock is looked at before a reading is said to lie at a time.
        (
            {"values": np.full((48, 5, 1), np.inf), "interval_minutes": np.asarray(2**63 - 1)},
            ["`interval_minutes`", "divide 1440"],
        ),
        ({"adjacency": np.ones((5, 4), np.float32)}, ["`adjacency`", "(5, 4)", "[5, 5]"]),
        ({"adjacency": np.eye(5, dtype=np.float32)}, ["self-loop", "diagonal"]),
        ({"adjacency": np.zeros((5, 5), np.float32)}, ["all zero"]),
        ({"adjacency": np.full((5, 5), np.nan, np.float32)}, ["not finite"]),
        ({"interval_minutes": np.asarray(7.5)}, ["`interval_minutes`", "7.5", "whole number"]),
        ({"interval_minutes": np.array([5, 10])}, ["`interval_minutes`", "whole number"]),
        ({"start": np.asarray("yesterday")}, ["`start`", "yesterday", "ISO"]),
        ({"start": np.asarray("2024-01-01T00:00Z")}, ["`start`", "time zone"]),
        ({"start": np.asarray("2024-01-01T00:00:30")}, ["`start`", "seconds"]),
        ({"node_ids": np.ones(5)}, ["`node_ids`", "float64", "texts"]),
        ({"kind": np.asarray(["crowd"])}, ["`kind`", "one text"]),
    ],
)
def test_a_wrong_key_is_one_line_that_names_the_file(tmp_path, changes, words):
    path = tmp_path / "town.npz"
    save_city(path, _CITY)
    arrays = {key: array for key, array in (_arrays(path) | changes).items() if array is not None}
    np.savez(path, allow_pickle=False, **arrays)
    with pytest.raises(InputError) as caught:
        load_city(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert [word for word in words if word not in message] == [], message


def test_a_reader_turns_a_speed_of_zero_into_a_missing_reading(tmp_path):
    path = tmp_path / "town.npz"
    save_city(path, _CITY)
    arrays = _arrays(path)
    values = np.ones((48, 5, 1))
    values[3, 2, 0] = 0
    np.savez(
        path, allow_pickle=False, **(arrays | {"values": values, "kind": np.asarray("speed"), "extra": np.ones(3)})
    )
    loaded = load_city(path).values
    assert np.isnan(loaded[3, 2, 0]) and np.isnan(loaded).sum() == 1
    np.savez(path, allow_pickle=False, **(arrays | {"values": values}))
    assert load_city(path).values[3, 2, 0] == 0


def test_names_of_regions_may_be_numbers(tmp_path):
    path = tmp_path / "town.npz"
    save_city(path, _CITY)
    np.savez(path, allow_pickle=False, **(_arrays(path) | {"node_ids": np.arange(5)}))
    assert load_city(path).node_ids == ("0", "1", "2", "3", "4")


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, simulated_cities):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_city("~/crowd_0.npz", simulated_cities[0])
    assert (tmp_path / "crowd_0.npz").is_file()
    assert load_city("~/crowd_0.npz").node_ids == find_cities("~", ["crowd_0"])[0].node_ids


def test_what_no_limit_can_be_and_homes_that_nobody_has_are_one_line(tmp_path):
    save_city(tmp_path / "town.npz", _CITY)
    for value in (float("nan"), -1.0):
        with pytest.raises(InputError, match=rf"`missing_above` must be at least 0, got {value}"):
            load_city(tmp_path / "town.npz", missing_above=value)
    for use in (load_city, lambda path: save_city(path, _CITY), lambda path: find_cities(path, ["town"])):
        with pytest.raises(InputError, match=r"'~no-such-user/town\.npz' begins with a home folder that is not known"):
            use("~no-such-user/town.npz")


def test_missing_files_and_folders_are_said(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_city(tmp_path / "none.npz")
    with pytest.raises(InputError, match="a folder; name a city file in it"):
        load_city(tmp_path)
    (tmp_path / "counts.csv").write_text("ds,a\n")
    with pytest.raises(InputError, match=r"not a readable npz file .*; make a city file of a table by .*prepare_city"):
        load_city(tmp_path / "counts.csv")
    with pytest.raises(InputError, match="cannot be written"):
        save_city(tmp_path / "absent" / "town.npz", _CITY)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "town.npz"
    save_city(path, _CITY)
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        save_city(path, dataclasses.replace(_CITY, place="Other"))
    with pytest.raises(InputError, match="`kind`"):
        save_city(path, dataclasses.replace(_CITY, kind="noise"))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_cities_are_found_by_name_in_the_order_asked_for(tmp_path):
    for name in ("b", "a", "c"):
        save_city(tmp_path / f"{name}.npz", _CITY)
    assert [city.name for city in find_cities(tmp_path, ["c", "a"])] == ["c", "a"]
    for names, words in (
        (["a", "d"], "city 'd' is not in .*; choose from a, b, c"),
        (["a", "a"], "named twice"),
        ([], "no city is named; choose from a, b, c"),
        (["../a"], "is not in"),
    ):
        with pytest.raises(InputError, match=words):
            find_cities(tmp_path, names)
    with pytest.raises(InputError, match="not a folder"):
        find_cities(tmp_path / "absent", ["a"])


@pytest.mark.skipif(not _DATA, reason="GPDIFF_DATA names no folder of real cities")
def test_every_published_city_is_valid_and_survives_a_round_trip(tmp_path):
    paths = sorted(pathlib.Path(str(_DATA)).glob("*.npz"))
    assert paths, f"{_DATA} holds no city file"
    for path in paths:
        city = load_city(path)
        with np.load(path, allow_pickle=False) as stored:
            np.testing.assert_array_equal(city.values, stored["values"])
            np.testing.assert_array_equal(city.adjacency(), stored["adjacency"])
        save_city(tmp_path / path.name, city)
        _assert_identical(load_city(tmp_path / path.name), city)
