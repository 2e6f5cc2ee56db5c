"""In: tables separated by commas, semicolons or tabs. Out: the same numbers, or one line that says why not."""

import numpy as np
import pandas as pd
import pytest

from gpdiff_jax import ingest
from gpdiff_jax.errors import InputError
from gpdiff_jax.ingest.table_file import numbers, read_table, separator_of

_LONG = [["unique_id", "ds", "y"]] + [
    [name, f"2024-05-0{day}T{hour:02}:00", f"{hour + 0.25 * number}"]
    for number, name in enumerate(("north", "south"))
    for day in (1, 2, 3)
    for hour in range(24)
]
_SITES = [["unique_id", "latitude", "longitude"], ["north", "48.137", "11.575"], ["south", "48.128", "11.604"]]
_EDGES = [["from", "to", "weight"], ["north", "south", "0.125"], ["south", "north", "1"]]
_MATRIX = [["0", "0.5"], ["0.25", "0"]]


def _write(folder, name, cells, separator):
    """As a spreadsheet writes it: with decimal commas where cells are not separated by commas."""
    decimal = "." if separator == "," else ","
    text = "\n".join(separator.join(cell.replace(".", decimal) for cell in line) for line in cells) + "\n"
    (folder / name).write_text(text, encoding="utf-8-sig")
    return folder / name


def _wide():
    table = pd.DataFrame(_LONG[1:], columns=_LONG[0]).pivot(index="ds", columns="unique_id", values="y").reset_index()
    return [list(table.columns), *table.to_numpy().tolist()]


@pytest.mark.parametrize("cells", [_LONG, _wide()], ids=["long", "wide"])
@pytest.mark.parametrize(("separator", "said"), [(";", "semicolons"), ("\t", "tabs")])
def test_a_city_of_tables_with_decimal_commas_is_that_of_tables_with_commas(tmp_path, cells, separator, said):
    made = {}
    for mark in (",", separator):
        paths = {
            "readings": _write(tmp_path, "counts.csv", cells, mark),
            "edges": _write(tmp_path, "edges.csv", _EDGES, mark),
            "sites": _write(tmp_path, "sites.csv", _SITES, mark),
        }
        made[mark], facts = ingest.city_from_tables(**paths, name="x", kind="crowd")
        lines = [line for line in ingest.fact_lines(facts) if line.startswith("written")]
        assert len(lines) == (mark != ",")
    assert (
        f"counts.csv is separated by {said}, edges.csv is" in lines[0] and "a comma within a number is deci" in lines[0]
    )
    for name in ("values", "weights", "senders", "latitude", "longitude"):
        np.testing.assert_array_equal(getattr(made[separator], name), getattr(made[","], name))
    assert made[separator].values[5, 1, 0] == 5.25 and made[separator].weights[0] == 0.125


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_matrix_and_an_array_of_readings_too(tmp_path, separator):
    path = _write(tmp_path, "matrix.csv", _MATRIX, separator)
    np.testing.assert_array_equal(ingest.read_matrix(path, ("a", "b")), [[0, 0.5], [0.25, 0]])
    series = ingest.read_series(_write(tmp_path, "array.csv", [["a", "b"], ["1.5", "2.25"], ["3", ""]], separator))
    assert series.ids == ("a", "b")
    np.testing.assert_array_equal(series.values, [[1.5, 2.25], [3, np.nan]])


@pytest.mark.parametrize(
    ("text", "header", "want"),
    [
        ("ds,a;1,b;2\n2024-05-01,1,2\n", True, ","),
        ("unique_id;ds;y\na,b;2024-05-01;3,5\n", True, ";"),
        ("ds;a,1;b,1\n2024-05-01T00:00;3,5;4,5\n", True, ";"),
        ("1,5;2,5\n3,5;4,5\n", False, ";"),
        ("1,5\t2,5\n3,5\t4,5\n", False, "\t"),
        ('id,"a;b",c\n1,2,3\n', True, ","),
        ("one region\n3\n", False, ","),
        ("ds\n2024-05-01\n", True, ","),
    ],
)
def test_the_separator_is_seen_in_the_first_lines(tmp_path, text, header, want):
    (tmp_path / "x.csv").write_text(text)
    assert separator_of(tmp_path / "x.csv", header=header) == want
    pd.read_csv(tmp_path / "x.csv", sep="\x01", header=None, quoting=3).to_csv(
        tmp_path / "x.csv.gz", index=False, header=False, sep="\x01", quoting=3
    )
    assert separator_of(tmp_path / "x.csv.gz", header=header) == want


@pytest.mark.parametrize(
    ("text", "header"),
    [
        ("unique_id|ds|y\na|2024-05-01|3\n", True),
        ("unique_id ds y\na 2024-05-01 3\n", True),
        ("1 2 3\n", False),
        ("a;b,c;d,e\n1;2,x;3,y\n", True),
    ],
)
def test_a_separator_that_cannot_be_told_is_refused(tmp_path, text, header):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(
        InputError, match=r"x\.csv has the first line '.*', by which it cannot be told .*; separate"
    ) as e:
        read_table(tmp_path / "x.csv", header=header)
    assert text.split("\n", maxsplit=1)[0] in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        (["12", "1.234"], "number '1.234' has a mark of which it cannot be told whether it is decimal"),
        (["12", "1,234"], "number '1,234' has a mark of which"),
        (["1,5", "1.234"], "numbers '1,5' and '1.234' have one a comma and one a point"),
        (["1.234,5"], "numbers '1.234,5' and '1.234,5' have one a comma"),
    ],
)
def test_marks_that_may_lie_between_thousands_are_refused(tmp_path, cells, said):
    (tmp_path / "x.csv").write_text("a;b\n" + "".join(f"{cell};0\n" for cell in cells))
    with pytest.raises(InputError, match=r"x\.csv: the ") as e:
        numbers(read_table(tmp_path / "x.csv"), ["a", "b"])
    assert said in str(e.value)


def test_numbers_with_one_mark_are_decimal(tmp_path):
    for text, want in (("1,234\n1,5", [1.234, 1.5]), ("0.125\n", [0.125]), ("1234,567", [1234.567]), ("1,5e3", [1500])):
        (tmp_path / "x.csv").write_text("a;b\n" + "".join(f"{cell};0\n" for cell in text.split()))
        np.testing.assert_array_equal(numbers(read_table(tmp_path / "x.csv"), ["a"])[:, 0], want)


@pytest.mark.parametrize(
    ("cell", "separator", "plain"),
    [
        ("1,233", ",", "1233"),
        ("-1,233,444", ",", "-1233444"),
        ("1 233", ",", "1233"),
        ("1 233", "\t", "1233"),
        ("1\u00a0233", ",", "1233"),
        ("12'233", ";", "12233"),
        ("1,233.5", ",", "1233.5"),
        ("1 233,5", ";", "1233.5"),
    ],
)
def test_marks_between_thousands_are_named_as_the_likely_cause(tmp_path, cell, separator, plain):
    (tmp_path / "x.csv").write_text(f'a{separator}b\n7{separator}8\n"{cell}"{separator}0\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"\(row 3, column 'a'\) is no number; it seems to have marks between") as e:
        numbers(read_table(tmp_path / "x.csv"), ["a", "b"])
    assert str(e.value).endswith(f"thousands: write {plain}") and "\n" not in str(e.value)


@pytest.mark.parametrize("cell", ["12,33", "1,233 ?", "01:233", "1,2334", "1 2", "1,233,5"])
def test_other_text_is_not_taken_for_thousands(tmp_path, cell):
    (tmp_path / "x.csv").write_text(f'a,b\n"{cell}",0\n')
    with pytest.raises(InputError, match="is no number; correct it, or leave it empty where it is missing"):
        numbers(read_table(tmp_path / "x.csv"), ["a", "b"])
