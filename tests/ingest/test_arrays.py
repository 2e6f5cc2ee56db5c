"""In: files as public data sets have them, written here. Out: their numbers; and pickles that are not loaded."""

import json
import pickle
from typing import Any

import numpy as np
import pandas as pd
import pytest

from gpdiff_jax.errors import InputError
from gpdiff_jax.ingest.arrays import read_matrix_file, read_series, series_grid
from gpdiff_jax.ingest.graph import read_edges, read_matrix, read_sites
from gpdiff_jax.ingest.plain_pickle import load_plain_pickle
from gpdiff_jax.ingest.readings import read_rows
from gpdiff_jax.ingest.steps import grid

_VALUES = np.arange(12.0).reshape(4, 3) + 0.5
_MATRIX = np.array([[1.0, 0.5, 0.0], [0.25, 1.0, 0.0], [0.0, 0.75, 1.0]])
_WEIGHTS = (_MATRIX - np.eye(3)).astype(np.float32)


def test_the_files_of_dcrnn(tmp_path):
    h5py = pytest.importorskip("h5py")
    times = np.datetime64("2012-03-01T00:00", "ns") + np.arange(4) * np.timedelta64(5, "m")
    # As pandas keeps a frame: columns in axis0, times in nanoseconds in axis1, values in blocks.
    with h5py.File(tmp_path / "metr-la.h5", "w") as file:
        frame = file.create_group("df")
        frame["axis0"] = np.array([b"773869", b"767541", b"767542"])
        frame["axis1"] = times.astype(np.int64)
        frame["block0_items"] = np.array([b"767541", b"767542", b"773869"])
        frame["block0_values"] = _VALUES
    series = read_series(tmp_path / "metr-la.h5")
    assert series.ids == ("773869", "767541", "767542")
    np.testing.assert_array_equal(series.values, _VALUES[:, [2, 0, 1]])
    made = series_grid(series, counts=False)
    assert made.interval_minutes == 5 and made.start == np.datetime64("2012-03-01T00:00")
    np.testing.assert_array_equal(made.values, _VALUES[:, [2, 0, 1]].astype(np.float32))
    # The pickle holds ids, their rows and the matrix, in another order than the readings.
    ids = ["767541", "767542", "773869"]
    held = [ids, {name: row for row, name in enumerate(ids)}, _MATRIX.astype(np.float32)]
    (tmp_path / "adj_mx.pkl").write_bytes(pickle.dumps(held, protocol=2))
    adjacency = read_matrix(tmp_path / "adj_mx.pkl", series.ids)
    np.testing.assert_array_equal(adjacency, _WEIGHTS[np.ix_([2, 0, 1], [2, 0, 1])])
    with pytest.raises(InputError, match=r"has no row of region 'x' \(1 such\); take the matrix that belongs"):
        read_matrix(tmp_path / "adj_mx.pkl", ("x", "767541"))


class _Opens:
    """What a pickle that runs code looks like: loading it calls `open`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_that_would_run_code_is_refused_and_does_not(tmp_path, protocol):
    (tmp_path / "adj_mx.pkl").write_bytes(pickle.dumps([["a"], {}, _Opens(tmp_path / "ran")], protocol=protocol))
    with pytest.raises(
        InputError, match=r"names (io|_io)\.open, and loading it could run code; save the matrix as .npy"
    ):
        read_matrix_file(tmp_path / "adj_mx.pkl")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_of_arrays_and_containers_is_loaded(tmp_path, protocol):
    held = {"m": _MATRIX, "n": np.float64(2.5), "s": {1, 2}, "t": ("a", b"b", None)}
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(held, protocol=protocol))
    made = load_plain_pickle(tmp_path / "plain.pkl")
    np.testing.assert_array_equal(made["m"], _MATRIX)
    assert made["n"] == 2.5 and made["t"] == ("a", b"b", None) and made["s"] == {1, 2}
    (tmp_path / "cut.pkl").write_bytes(pickle.dumps(held, protocol=protocol)[:40])
    with pytest.raises(InputError, match="damaged pickle"):
        load_plain_pickle(tmp_path / "cut.pkl")


def test_arrays_with_channels_and_a_known_start(tmp_path):
    array = np.stack([_VALUES, 10 * _VALUES], axis=2)
    np.savez(tmp_path / "pems04.npz", data=array)
    np.save(tmp_path / "dataset.npy", array)
    for name in ("pems04.npz", "dataset.npy"):
        series = read_series(tmp_path / name, channel=1)
        made = series_grid(series, counts=True, interval_minutes=5, start="2018-01-01T00:00")
        np.testing.assert_array_equal(made.values, (10 * _VALUES).astype(np.float32))
        assert made.ids == ("0", "1", "2") and made.start == np.datetime64("2018-01-01T00:00")
    assert series_grid(series, counts=True, interval_minutes=5).start is None
    with pytest.raises(InputError, match=r"`channel` \(=2\) must be in 0..1"):
        read_series(tmp_path / "dataset.npy", channel=2)
    with pytest.raises(InputError, match="has no times; say by --interval_minutes"):
        series_grid(series, counts=True)
    for wrong, said in (("now", "an ISO time"), ("2018-01-01T00:00+01:00", "local time in whole minutes")):
        with pytest.raises(InputError, match=f"`start` .* must be {said}"):
            series_grid(series, counts=True, interval_minutes=5, start=wrong)
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(InputError, match="damaged or holds objects"):
        read_series(tmp_path / "objects.npy")


def test_the_files_of_stgcn_and_tgcn(tmp_path):
    np.savetxt(tmp_path / "vel.csv", _VALUES, delimiter=",")
    np.testing.assert_array_equal(read_series(tmp_path / "vel.csv").values, _VALUES)
    (tmp_path / "sz_speed.csv").write_text("90217,90225,90231\n" + (tmp_path / "vel.csv").read_text())
    series = read_series(tmp_path / "sz_speed.csv")
    assert series.ids == ("90217", "90225", "90231")
    np.testing.assert_array_equal(series.values, _VALUES)
    # Whole numbers above whole numbers are readings.
    (tmp_path / "counts.csv").write_text("3,1,2\n5,6,7\n")
    np.testing.assert_array_equal(read_series(tmp_path / "counts.csv").values, [[3, 1, 2], [5, 6, 7]])
    np.savetxt(tmp_path / "sz_adj.csv", _MATRIX, delimiter=",")
    np.testing.assert_array_equal(read_matrix(tmp_path / "sz_adj.csv", series.ids), _WEIGHTS)
    # As scipy.sparse.save_npz writes a matrix in rows, and in columns.
    rows, columns = np.nonzero(_MATRIX)
    for layout, at in (("csr", np.lexsort((columns, rows))), ("csc", np.lexsort((rows, columns)))):
        major, minor = (rows, columns) if layout == "csr" else (columns, rows)
        arrays = {"indices": minor[at], "indptr": np.searchsorted(major[at], np.arange(4)), "format": layout.encode()}
        np.savez(tmp_path / "adj.npz", data=_MATRIX[rows, columns][at], shape=(3, 3), **arrays)
        np.testing.assert_array_equal(read_matrix(tmp_path / "adj.npz", series.ids), _WEIGHTS)
    np.savez(tmp_path / "adj.npz", data=[1.0], shape=(3, 3), indices=[7], indptr=[0, 1, 1, 1], format=b"csr")
    with pytest.raises(InputError, match="damaged sparse matrix"):
        read_matrix(tmp_path / "adj.npz", series.ids)


def test_the_atomic_files_of_libcity(tmp_path):
    dyna = ["dyna_id,type,time,entity_id,in_flow,out_flow"]
    for hour in range(3):
        dyna += [f"{hour},state,2016-02-01T0{hour}:00:00Z,{region},{10 * hour + region},1" for region in (7, 3)]
    (tmp_path / "x.dyna").write_text("\n".join(dyna))
    (tmp_path / "x.rel").write_text("rel_id,type,origin_id,destination_id,cost\n0,geo,7,3,2.0\n1,geo,3,7,4.0\n")
    points = {7: [-118.3, 34.1], 3: [[0.0, 10.0], [2.0, 20.0]]}
    geo = [f'{region},Point,"{json.dumps(point)}"' for region, point in points.items()]
    (tmp_path / "x.geo").write_text("geo_id,type,coordinates\n" + "\n".join(geo))
    made = grid(read_rows(tmp_path / "x.dyna"), counts=True)
    assert made.ids == ("7", "3") and made.start == np.datetime64("2016-02-01T00:00")
    np.testing.assert_array_equal(made.values, [[7, 3], [17, 13], [27, 23]])
    out = read_rows(tmp_path / "x.dyna", columns=("entity_id", "time", "out_flow"))
    np.testing.assert_array_equal(grid(out, counts=True).values, np.ones((3, 2)))
    adjacency = read_edges(tmp_path / "x.rel", made.ids, distances=True)
    want = np.exp(-np.square(np.array([2.0, 4.0]) / 3.0))
    np.testing.assert_allclose([adjacency[0, 1], adjacency[1, 0]], want, rtol=1e-6)
    sites = read_sites(tmp_path / "x.geo", made.ids)
    np.testing.assert_array_equal(sites.latitude, [34.1, 15.0])
    np.testing.assert_array_equal(sites.longitude, [-118.3, 1.0])
    (tmp_path / "y.rel").write_text("rel_id,type,origin_id,destination_id\n0,geo,7,3\n")
    np.testing.assert_array_equal(read_edges(tmp_path / "y.rel", made.ids), [[0, 1], [0, 0]])


def test_a_distance_must_be_called_one(tmp_path):
    pd.DataFrame({"from": ["a"], "to": ["b"], "distance": [120.0]}).to_csv(tmp_path / "d.csv", index=False)
    with pytest.raises(InputError, match="column 'distance'; say by --distances"):
        read_edges(tmp_path / "d.csv", ("a", "b"))


class _Says:
    """Pickles as a call of a function by name, with any arguments and any state."""

    def __init__(self, function, words, state=None):
        self.parts = function, words, state

    def __reduce__(self):
        function, words, state = self.parts
        return function, words, *(() if state is None else (state,))


# Where numpy keeps what loads the buffer of an array.
_FROMBUFFER = np.zeros(1).__reduce_ex__(5)[0]
_FLAGS_OFF = (3, "|", None, None, None, -1, -1, 0)


@pytest.mark.parametrize(
    "forged",
    [
        _Says(_FROMBUFFER, (b"A" * 16, _Says(np.dtype, ("O8", False, True), _FLAGS_OFF), (2,), "C")),
        _Says(
            _FROMBUFFER,
            (
                b"A" * 16,
                _Says(np.dtype, ("V8", False, True), (3, "|", None, ("a",), {"a": (np.dtype("f8"), 0)}, 8, 1, 0)),
                (2,),
                "C",
            ),
        ),
        _Says(_FROMBUFFER, (b"A" * 16, np.dtype("f8"), (1 << 60,), "C")),
        _Says(np.ndarray, ((1 << 40,),)),
        _Says(bytes, (3_000_000_000,)),
    ],
)
def test_forged_arrays_are_refused(tmp_path, forged):
    (tmp_path / "adj_mx.pkl").write_bytes(pickle.dumps([["a", "b"], {}, forged], protocol=5))
    with pytest.raises(InputError, match=r"damaged pickle|could run code"):
        read_matrix_file(tmp_path / "adj_mx.pkl")


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<i8", "|u1", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_every_plain_dtype_come_back(tmp_path, dtype, order):
    array = np.asarray(np.arange(6).reshape(2, 3), dtype=dtype, order=order)
    for protocol in (0, 2, 5):
        (tmp_path / "plain.pkl").write_bytes(pickle.dumps(array, protocol=protocol))
        made = load_plain_pickle(tmp_path / "plain.pkl")
        assert made.dtype == array.dtype
        np.testing.assert_array_equal(made, array)


def test_what_is_no_matrix_is_named(tmp_path):
    path = tmp_path / "m.pkl"
    for held, message in (
        ([1, 2, 3], "list that is no list of rows"),
        ([[1, 2], [3]], "2 rows, of which row 2 has 1 cells"),
        ([[1, 2], [3, None]], "NoneType in row 2"),
        ([[1, [2]], [3, 4]], "list in row 1"),
        (["ab", "cd"], "list that is no list of rows"),
        ({}, "dict that is no list of rows"),
        ([], "list that is no list of rows"),
        (None, "a matrix of numbers"),
        ([["a"], {}, np.zeros((2, 3))], r"of shape \(2, 3\)"),
    ):
        path.write_bytes(pickle.dumps(held))
        with pytest.raises(InputError, match=message):
            read_matrix_file(path)
    path.write_bytes(pickle.dumps(_WEIGHTS.tolist()))
    np.testing.assert_array_equal(read_matrix_file(path)[0], _WEIGHTS)
    good = {"data": [1.0], "shape": (3, 3), "indices": [1], "indptr": [0, 1, 1, 1], "format": b"csr"}
    for wrong in (
        {"shape": (3, 3, 3)},
        {"shape": 3},
        {"format": [b"csr", b"csc"]},
        {"format": b"coo"},
        {"indices": [-1]},
        {"indices": [1, 2], "data": [1.0, 2.0]},
        {"data": [1j]},
    ):
        arrays: dict[str, Any] = good | wrong
        np.savez(tmp_path / "adj.npz", **arrays)
        with pytest.raises(InputError, match=r"damaged sparse matrix|in the layout 'coo'"):
            read_matrix_file(tmp_path / "adj.npz")
    (tmp_path / "m.csv").write_text("1,2\n,4\n")
    with pytest.raises(InputError, match="a cell without a number; 0 stands for no link"):
        read_matrix_file(tmp_path / "m.csv")


@pytest.mark.parametrize(
    ("text", "ids", "first"),
    [
        ("3,1,2\n5,nan,7\n1,2,3\n", ("0", "1", "2"), [3, 1, 2]),
        ("5,2.5,7\n1,2,3\n", ("0", "1", "2"), [5, 2.5, 7]),
        ("66.5,,1.5\n1,2,3\n", ("0", "1", "2"), [66.5, np.nan, 1.5]),
        ("\ufeff66.5,2,1.5\n1,2,3\n", ("0", "1", "2"), [66.5, 2, 1.5]),
        ("0,1,2\n5,6,7\n", ("0", "1", "2"), [5, 6, 7]),
        ("90217,90225\n23.5,40\n", ("90217", "90225"), [23.5, 40]),
        ("north,7\n23.5,40\n", ("north", "7"), [23.5, 40]),
    ],
)
def test_a_line_of_ids_is_told_from_one_of_readings(tmp_path, text, ids, first):
    (tmp_path / "x.csv").write_text(text, encoding="utf-8")
    series = read_series(tmp_path / "x.csv")
    assert series.ids == ids
    np.testing.assert_array_equal(series.values[0], first)


@pytest.mark.parametrize("unit", ["ns", "us", "s"])
def test_times_in_hdf5_are_of_the_unit_that_is_written_there(tmp_path, unit):
    h5py = pytest.importorskip("h5py")
    times = np.datetime64("2024-10-26T22:00", unit) + np.arange(5) * np.timedelta64(1, "h")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        frame = file.create_group("df")
        frame["axis0"], frame["axis1"] = np.array([b"a"]), times.astype(np.int64)
        frame["axis1"].attrs["kind"] = f"datetime64[{unit}]"
        frame["axis1"].attrs["tz"] = "UTC"
        frame["block0_items"], frame["block0_values"] = np.array([b"a"]), np.arange(5.0)[:, None]
    series = read_series(tmp_path / "x.h5", time_zone="Europe/Berlin")
    made = series_grid(series, counts=True, time_zone="Europe/Berlin")
    assert made.start == np.datetime64("2024-10-27T00:00") and made.repeated == 1
    np.testing.assert_array_equal(made.values[:, 0], [0, 1, 2.5, 4])


def test_zeros_are_no_distances_and_costs_may_be(tmp_path):
    chain = np.zeros((5, 5))
    for k, distance in enumerate((1.0, 2.0, 3.0, 4.0)):
        chain[k, k + 1] = chain[k + 1, k] = distance
    np.save(tmp_path / "d.npy", chain)
    made = read_matrix(tmp_path / "d.npy", tuple("abcde"), distances=True)
    want = np.exp(-np.square(np.array([1.0, 2.0, 3.0, 4.0]) / np.std([1.0, 2.0, 3.0, 4.0])))
    np.testing.assert_allclose(np.diag(made, 1), np.where(want < 0.1, 0, want), rtol=1e-6)
    assert not made[0, 2:].any()
    (tmp_path / "e.csv").write_text("from,to,cost\na,b,0.9\nb,a,0.05\n")
    with pytest.raises(InputError, match="column 'cost'; say by --distances or --nodistances"):
        read_edges(tmp_path / "e.csv", ("a", "b"))
    np.testing.assert_allclose(read_edges(tmp_path / "e.csv", ("a", "b"), distances=False), [[0, 0.9], [0.05, 0]])
    (tmp_path / "e.csv").write_text("from,to,weight\na,b,120\n")
    with pytest.raises(InputError, match=r"the weight 120 \(row 2\), which is above 1; say by --distances"):
        read_edges(tmp_path / "e.csv", ("a", "b"))


def test_a_signalling_nan_is_a_reading_that_is_missing_and_no_warning(tmp_path, recwarn):
    values = _VALUES.astype(np.float32)
    values.view(np.uint32)[1, 2] = 0x7F800001
    np.save(tmp_path / "series.npy", values)
    made = read_series(tmp_path / "series.npy").values
    np.testing.assert_array_equal(np.isnan(made), np.isnan(values))
    assert [str(warning.message) for warning in recwarn] == []
