"""In: tables whose columns are named in other ways. Out: their regions and readings, or what is wrong."""

import pickle

import numpy as np
import pytest

from gpdiff_jax.errors import InputError
from gpdiff_jax.ingest.graph import read_edges, read_matrix, read_sites
from gpdiff_jax.ingest.readings import read_rows


def _write(tmp_path, text, name="table.csv"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_a_format_with_offsets_holds_across_a_clock_change(tmp_path):
    text = "Zeit,Zoo,Markt\n31.03.2024 01:00 +0100,1,2\n31.03.2024 03:00 +0200,3,4\n"
    rows = read_rows(_write(tmp_path, text), time_format="%d.%m.%Y %H:%M %z")
    assert rows.ids == ("Zoo", "Markt") and rows.values.tolist() == [1, 2, 3, 4]


def test_a_long_table_of_one_sensor_is_not_taken_for_a_wide_one(tmp_path):
    text = "Datum,Sensor,Wert\n" + "".join(f"2024-05-0{day},17,{day}\n" for day in (1, 2, 3))
    with pytest.raises(InputError, match="of which 'Sensor' looks like that of a long table; a long one needs"):
        read_rows(_write(tmp_path, text))
    assert read_rows(_write(tmp_path, text), columns=("Sensor", "Datum", "Wert")).ids == ("17",)


def test_the_column_that_a_table_lacks_is_named(tmp_path):
    with pytest.raises(InputError, match=r"needs Zaehler, Zeit, Zahl, of which it lacks 'Zaehler' \(name others by"):
        read_rows(_write(tmp_path, "Zähler,Zeit,Zahl\nA,2024-05-01T00:00,3\n"), columns=("Zaehler", "Zeit", "Zahl"))


@pytest.mark.parametrize("name", ["Zeit", "Datum/Uhrzeit", "heure"])
@pytest.mark.parametrize(("form", "first"), [(None, "2024-05-0{} 00:00"), ("%d %b %Y", "0{} May 2024")])
def test_a_first_column_of_times_may_have_any_name(tmp_path, name, form, first):
    text = f"{name};Zoo;Markt\n" + "".join(f"{first.format(day)};{day};2\n" for day in (1, 2, 3))
    rows = read_rows(_write(tmp_path, text), time_format=form)
    assert rows.ids == ("Zoo", "Markt")
    np.testing.assert_array_equal(rows.values, [1, 2, 2, 2, 3, 2])
    # One of other cells is none, and what looks like a long table is told to be one.
    with pytest.raises(InputError, match="and the first is no time; a long one needs"):
        read_rows(_write(tmp_path, text.replace("0", "x")), time_format=form)
    again = text + text.split("\n", 1)[1] * 2
    with pytest.raises(InputError, match="come several times, as in a long one"):
        read_rows(_write(tmp_path, again), time_format=form)


def test_letters_with_marks_are_the_same_however_they_are_written(tmp_path):
    composed, apart = "K\u00f6nigsplatz", "Ko\u0308nigsplatz"
    assert composed != apart
    sites = _write(tmp_path, f"unique_id,latitude,longitude\n{composed},50,8\nb,51,9\n", "sites.csv")
    edges = _write(tmp_path, f"from,to\n{composed},b\n", "edges.csv")
    for text in (f"ds,{apart},b\n2024-05-01,1,2\n", f"unique_id,ds,y\n{apart},2024-05-01,1\nb,2024-05-01,2\n"):
        ids = read_rows(_write(tmp_path, text)).ids
        assert ids == (composed, "b")
        np.testing.assert_array_equal(read_sites(sites, ids).latitude, [50, 51])
        np.testing.assert_array_equal(read_edges(edges, ids), [[0, 1], [0, 0]])
    other = _write(tmp_path, f"{composed},t,n\na,2024-05-01,1\n")
    assert read_rows(other, columns=(apart, "t", "n")).ids == ("a",)
    with open(tmp_path / "m.pkl", "wb") as file:
        pickle.dump(([apart, "b"], {apart: 0, "b": 1}, np.array([[0, 1], [1, 0]], np.float32)), file, protocol=2)
    np.testing.assert_array_equal(read_matrix(tmp_path / "m.pkl", (composed, "b")), [[0, 1], [1, 0]])
