"""In: text files as spreadsheets write them. Out: the same city from all, or one line that says how to save them."""

import errno
import gzip
import tarfile
import zipfile

import numpy as np
import pytest
from pandas.io.common import get_handle

from gpdiff_jax import host_memory, ingest
from gpdiff_jax.errors import InputError
from gpdiff_jax.ingest.table_file import read_table
from gpdiff_jax.ingest.text_file import read_cells, text_form, text_lines

_SITES = "unique_id,latitude,longitude\nMüller,1,2\nŁódź,1,3\n"


def _long(separator=",", last="5"):
    cells = [
        (name, f"2024-05-0{day}T{hour:02}:00", f"{hour}")
        for name in ("Müller", "Łódź")
        for day in (1, 2)
        for hour in range(24)
    ]
    cells = [("unique_id", "ds", "y"), *cells[:-1], (*cells[-1][:2], last)]
    return "".join(separator.join(line) + "\r\n" for line in cells)


def _city(tmp_path, content, name="counts.csv"):
    (tmp_path / "sites.csv").write_text(_SITES, encoding="utf-8")
    (tmp_path / name).write_bytes(content)
    return ingest.city_from_tables(tmp_path / name, name="x", kind="crowd", sites=tmp_path / "sites.csv")[0]


@pytest.mark.parametrize("first", [True, False], ids=["sep=", "plain"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_encodings_that_a_file_names_and_its_line_of_the_separator_are_read(tmp_path, encoding, separator, first):
    text = ("\ufeff" if encoding == "utf-16-be" else "") + (f"sep={separator}\r\n" if first else "")
    made = _city(tmp_path, (text + _long(separator)).encode(encoding))
    assert made.node_ids == ("Müller", "Łódź")
    np.testing.assert_array_equal(made.values[:, 0, 0], np.tile(np.arange(24), 2))
    zipped = _city(tmp_path, gzip.compress((text + _long(separator)).encode(encoding)), "counts.csv.gz")
    np.testing.assert_array_equal(zipped.values, made.values)
    # Rows are those of the file.
    with pytest.raises(InputError, match=rf"'many' \(row {97 + first}, column 'y'\)"):
        _city(tmp_path, (text + _long(separator, "many")).encode(encoding))


def test_a_line_of_the_separator_above_numbers_without_times(tmp_path):
    (tmp_path / "x.csv").write_text("sep=;\na;b\n1,5;2\n3;many\n")
    with pytest.raises(InputError, match=r"'many' \(row 4, "):
        ingest.read_series(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_text('"sep=;"\na;b\n1,5;2\n3;4\n')
    series = ingest.read_series(tmp_path / "x.csv")
    assert series.ids == ("a", "b") and text_form(tmp_path / "x.csv").separator == ";"
    np.testing.assert_array_equal(series.values, [[1.5, 2], [3, 4]])
    assert text_lines(tmp_path / "x.csv", 2) == ['"sep=;"', "a;b"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            _long().replace("Ł", "L").replace("ź", "z").encode("cp1252"),
            r'not UTF-8 text \(.*0xfc\); save it as "CSV UTF-8"',
        ),
        (_long().encode("utf-16-le"), r'not UTF-8 text \(.*\); save it as "CSV UTF-8"'),
        (b"ds,a\n" + b"2024-05-01,1\n" * 100_000 + "2024-05-02,ü".encode("cp1252"), r"not UTF-8 text \(.*0xfc\)"),
        (b"\xff\xfe" + _long().encode("utf-16-le")[:-1], "begins as UTF-16 and is none; save it as"),
        (("sep=|\n" + _long("|")).encode(), r"first line 'sep=\|'; separate cells by commas, semicolons or tabs"),
        (b"", "is empty; export it again"),
        (b"\xef\xbb\xbf", "is empty; export it again"),
        (b"\n\n", "is empty; export it again"),
    ],
)
def test_other_files_are_refused_with_what_to_do(tmp_path, content, said):
    with pytest.raises(InputError, match=rf"counts\.csv.* {said}") as error:
        _city(tmp_path, content)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["x.csv", "x.csv.gz", "x.parquet", "x.npy", "x.npz", "x.h5", "x.pkl"])
def test_an_empty_file_is_said_to_be_empty(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    for read in (ingest.read_rows, ingest.read_series, ingest.read_matrix_file):
        with pytest.raises(InputError, match="is empty; export it again"):
            read(path)


@pytest.mark.parametrize("name", ["x.csv", "x.csv.gz", "x.csv.xz", "x.csv.zip"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_text_larger_than_memory_is_refused_before_it_is_unpacked(tmp_path, monkeypatch, name, encoding):
    text = "time,a\n" + "2024-05-01T00:00,0\n" * 100_000
    path = tmp_path / name
    with get_handle(path, "wb", compression="infer", is_text=False) as opened:
        opened.handle.write(text.encode(encoding))
    assert read_table(path).frame.shape == (100_000, 2)
    monkeypatch.setattr(host_memory, "host_bytes", lambda: 2**20)
    with pytest.raises(InputError, match=rf"{name} takes (\d MiB, )?more than the 1 MiB of memory that are free"):
        read_table(path)


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    path.write_text(_long())

    def refused(*words, **more):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refused)
    monkeypatch.setattr("io.open", refused)
    with pytest.raises(
        InputError, match=r"table.csv cannot be read \(Permission denied\); check the file and its perm"
    ):
        read_table(path)


def test_archives_that_are_no_table_are_refused(tmp_path):
    with tarfile.open(tmp_path / "x.csv.tar.bz2", "w:bz2") as archive:
        archive.add(__file__, "x.csv")
    with pytest.raises(InputError, match=r"x\.csv\.tar\.bz2 is a tar archive; unpack it"):
        read_table(tmp_path / "x.csv.tar.bz2")
    for name in ("mac.zip", "book.xlsx", "book.csv"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("x.csv", "a,b\n1,2\n")
            archive.writestr("__MACOSX/._x.csv", b"")
        said = r"mac\.zip holds 2 files and folders; unpack" if name == "mac.zip" else "is a workbook or a zip archive"
        with pytest.raises(InputError, match=said):
            read_table(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "x.csv.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("x.csv", "a,b\n1,2\n")
    with pytest.raises(InputError, match=r"x\.csv\.zip is packed by bzip2; pack it by deflate"):
        read_table(tmp_path / "x.csv.zip")


def test_cells_without_text_take_memory_too(tmp_path, monkeypatch):
    path = tmp_path / "x.csv.gz"
    path.write_bytes(gzip.compress(b"," * 999 + b"\n" + (b"," * 999 + b"\n") * 200))
    monkeypatch.setattr(host_memory, "host_bytes", lambda: 2**20)
    with pytest.raises(InputError, match="takes more than the 1 MiB"):
        read_cells(path, ",")
