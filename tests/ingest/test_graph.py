"""In: tables of edges and sites, and matrices. Out: weights, by hand."""

import numpy as np
import pytest

from gpdiff_jax import host_memory
from gpdiff_jax.errors import InputError
from gpdiff_jax.ingest.graph import (
    Sites,
    gaussian_kernel,
    great_circle_km,
    nearest_sites,
    read_edges,
    read_matrix,
    read_sites,
)

_IDS = ("a", "b", "c", "d")


def _write(tmp_path, text, name="table.csv"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_edges_run_from_row_to_column(tmp_path):
    path = _write(tmp_path, "from,to,weight\na,b,0.5\nc,a,1\nz,a,0.3\nb,b,0.9\n")
    want = np.zeros((4, 4), np.float32)
    want[0, 1], want[2, 0] = 0.5, 1.0
    np.testing.assert_array_equal(read_edges(path, _IDS), want)


def test_distances_become_a_gaussian_kernel(tmp_path):
    path = _write(tmp_path, "from,to,distance\na,b,100\nb,c,300\nc,d,2000\n")
    spread = np.std([100.0, 300.0, 2000.0])
    want = np.zeros((4, 4))
    want[0, 1], want[1, 2] = np.exp(-((100 / spread) ** 2)), np.exp(-((300 / spread) ** 2))
    np.testing.assert_allclose(read_edges(path, _IDS, distances=True), want, rtol=1e-6)
    assert np.exp(-((2000 / spread) ** 2)) < 0.1  # too far to be an edge
    same = gaussian_kernel(np.array([[np.nan, 2.0], [2.0, np.nan]]))
    np.testing.assert_allclose(same, np.exp(-1.0) * (1 - np.eye(2)), rtol=1e-6)


def test_the_nearest_sites_are_linked_both_ways():
    # On the equator at 0, 1, 3 and 30 degrees; a degree is 111.195 km.
    sites = Sites(np.zeros(4), np.array([0.0, 1.0, 3.0, 30.0]))
    np.testing.assert_allclose(great_circle_km(sites)[0], np.array([0, 1, 3, 30]) * 111.1951, rtol=1e-5)
    made = nearest_sites(sites, 1)
    # The farthest neighbours lie 1, 1, 2 and 27 degrees away; their median is 1.5.
    want = np.zeros((4, 4))
    want[0, 1] = want[1, 0] = np.exp(-((1 / 1.5) ** 2))
    want[1, 2] = want[2, 1] = np.exp(-((2 / 1.5) ** 2))
    want[2, 3] = want[3, 2] = 1e-6  # nobody is left alone
    np.testing.assert_allclose(made, want, rtol=1e-4)
    poles = great_circle_km(Sites(np.array([90.0, -90.0]), np.array([0.0, 77.0])))
    np.testing.assert_allclose(poles[0, 1], np.pi * 6371.0088, rtol=1e-6)
    assert (nearest_sites(Sites(np.zeros(3), np.zeros(3))) > 0).sum() == 6  # all at one place


def test_weights_between_more_regions_than_there_is_memory_for_are_refused_unmade(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "host_bytes", lambda: 2**20)
    ids = tuple(f"r{number}" for number in range(400))
    for third in ("weight", "distance"):
        path = _write(tmp_path, f"from,to,{third}\nr0,r1,0.5\n")
        with pytest.raises(InputError, match=r"table.csv takes 2 MiB, more than the 1 MiB of memory"):
            read_edges(path, ids, distances=third == "distance")
    with pytest.raises(InputError, match="a table of the distances between 400 regions takes 5 MiB, more than"):
        nearest_sites(Sites(np.zeros(400), np.arange(400.0) / 10))


def test_sites_come_in_the_order_of_the_regions(tmp_path):
    path = _write(tmp_path, "unique_id,latitude,longitude\nd,4,40\nb,2,20\na,1,10\nc,3,30\nz,9,90\n")
    made = read_sites(path, _IDS)
    np.testing.assert_array_equal(made.latitude, [1, 2, 3, 4])
    np.testing.assert_array_equal(made.longitude, [10, 20, 30, 40])


def test_distances_that_are_nearly_alike_make_weights_too(tmp_path):
    rows = "".join(
        f"{one},{other},{300 + 10 * number}\n" for number, (one, other) in enumerate(("ab", "bc", "cd", "da"))
    )
    path = _write(tmp_path, "from,to,distance\n" + rows)
    made = read_edges(path, _IDS, distances=True)
    np.testing.assert_allclose(made[0, 1], np.exp(-((300 / 315) ** 2)), rtol=1e-6)
    assert (made > 0).sum() == 4


def test_edges_without_weights_are_all_alike(tmp_path):
    made = read_edges(_write(tmp_path, "from,to\na,b\nc,a\n"), _IDS)
    assert made[0, 1] == made[2, 0] == made.max() == 1 and made.sum() == 2


@pytest.mark.parametrize("name", ["matrix.npy", "matrix.csv"])
def test_a_matrix_loses_its_diagonal(tmp_path, name):
    matrix = np.random.default_rng(0).uniform(size=(4, 4)) * (1 - np.eye(4)) + np.eye(4)
    matrix[0, 1] = 0.0
    path = tmp_path / name
    np.save(path, matrix) if name.endswith("npy") else np.savetxt(path, matrix, delimiter=",")
    made = read_matrix(path, _IDS)
    np.testing.assert_allclose(made, matrix * (1 - np.eye(4)), rtol=1e-6)


def test_a_matrix_of_distances_is_recognised(tmp_path):
    sites = Sites(np.zeros(5), np.array([0.0, 1.0, 3.0, 10.0, 30.0]))
    distances = great_circle_km(sites)
    path = tmp_path / "matrix.npy"
    np.save(path, distances)
    with pytest.raises(InputError, match=r"looks like distances .*--distances"):
        read_matrix(path, ("a", "b", "c", "d", "e"))
    made = read_matrix(path, ("a", "b", "c", "d", "e"), distances=True)
    apart = distances[~np.eye(5, dtype=bool)]
    np.testing.assert_allclose(made[0, 1], np.exp(-((distances[0, 1] / apart.std()) ** 2)), rtol=1e-6)
    assert made[0, 1] > made[0, 2] > 0 and made[0, 4] == 0 and not np.diag(made).any()


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (read_edges, "a,b,c\n1,2,3\n", "has the columns a, b, c; edges need from and to, and weight or distance"),
        (
            read_edges,
            "from,to,weight\nx,y,1\n",
            "its first is from 'x', and the first region is 'a'",
        ),
        (read_edges, "from,to,weight\na,b,1\na,b,0.5\n", "lists the edge from 'a' to 'b' twice, again in row 3"),
        (
            read_edges,
            "from,to,weight\na,b,near\n",
            r"table.csv: the reading 'near' \(row 2, column 'weight'\) is no number",
        ),
        (read_edges, "from,to,weight\nx,y,\na,b,1\nb,c,nan\n", r"an edge has no weight \(row 4\); write one, or leave"),
        (read_edges, "from,to,weight\na,b,\n", r"an edge has no weight \(row 2\)"),
        (read_edges, "from,to,weight\na,a,1\nx,y,1\n", "links regions of the city with themselves alone"),
        (read_matrix, ",a,b\na,0,1\nb,1,0\n", "a matrix in CSV has numbers alone, no names: its rows and columns are"),
        (read_sites, "id,lat,lon\na,1,2\n", "has the columns id, lat, lon; sites need unique_id, latitude, longitude"),
        (read_sites, "unique_id,latitude,longitude\na,1,2\na,1,2\n", "has two sites of 'a', the second in row 3"),
        (read_sites, "unique_id,latitude,longitude\na,1,2\n", r"has no site of region 'b' \(3 such\)"),
        (
            read_sites,
            "unique_id,latitude,longitude\na,91,2\nb,1,2\nc,1,2\nd,1,2\n",
            r"`latitude` \(=91.0\) of region 'a' \(row 2\) must be degrees in -90..90",
        ),
        (read_matrix, "1,2\n3,4\n", r"holds a matrix of shape \(2, 2\); the 4 regions need \[4, 4\]"),
        (read_matrix, "from,to\n3,4\n", r"table.csv: the reading 'from' \(row 1, column '0'\) is no number"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, read, text, message):
    with pytest.raises(InputError, match=message) as said:
        read(_write(tmp_path, text), _IDS)
    assert str(said.value).startswith(str(tmp_path / "table.csv")) and "\n" not in str(said.value)


def test_negative_distances_are_none(tmp_path):
    with pytest.raises(InputError, match=r"table.csv: the distance -1 \(row 2\) is negative"):
        read_edges(_write(tmp_path, "from,to,distance\na,b,-1\n"), _IDS, distances=True)
    matrix = np.zeros((4, 4))
    matrix[1, 2] = -2.0
    np.save(tmp_path / "matrix.npy", matrix)
    for distances in (True, False):
        with pytest.raises(InputError, match=r"matrix.npy has -2 from 'b' to 'c', which is negative"):
            read_matrix(tmp_path / "matrix.npy", _IDS, distances=distances)
