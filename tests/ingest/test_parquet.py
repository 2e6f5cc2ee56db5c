"""In: Parquet files, some of which are small and stand for tables without end. Out: tables, or one line."""

import decimal
import pathlib

import numpy as np
import pandas as pd
import pytest

from gpdiff_jax.errors import InputError
from gpdiff_jax.ingest import confined
from gpdiff_jax.ingest.table_file import read_table

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def _runs(path: pathlib.Path) -> None:
    ones = pa.table({"ds": ["a"] * 200_000, "y": pa.repeat(pa.scalar(1.0), 200_000)})
    with pq.ParquetWriter(path, ones.schema) as file:
        for _ in range(300):
            file.write_table(ones)


def _dictionary(path: pathlib.Path) -> None:
    text = pa.table({"ds": pa.repeat(pa.scalar("x" * 10_000), 20_000)})
    with pq.ParquetWriter(path, text.schema) as file:
        for _ in range(8):
            file.write_table(text)


def _fixed(path: pathlib.Path) -> None:
    pq.write_table(pa.table({"ds": pa.array([b"x" * 10**6] * 1500, pa.binary(10**6))}), path)


@pytest.mark.parametrize("write", [_runs, _dictionary, _fixed])
def test_a_small_file_that_stands_for_a_table_without_end_is_refused(tmp_path, monkeypatch, write):
    path = tmp_path / "x.parquet"
    write(path)
    assert path.stat().st_size < 500_000
    monkeypatch.setattr(confined, "host_bytes", lambda: 2**26)
    with pytest.raises(InputError, match=r"x\.parquet(: it takes more than the memory| cannot be read as parquet \()"):
        read_table(path)


def test_all_that_pandas_reads_is_read(tmp_path):
    times = pd.date_range("2024-05-01", periods=4, freq="h", tz="Europe/Amsterdam")
    place = [{"x": 1.0, "y": 2.0}] * 4
    frame = pd.DataFrame(
        {
            "kind": pd.Categorical(["u", "v", "u", "u"]),
            "unique_id": ["a", None, "a", "b"],
            "pm2.5": [1, 2, 3, 4],
            "place": place,
            "many": [[1, 2]] * 4,
            "price": [decimal.Decimal("1.50")] * 4,
        },
        index=times.rename("ds"),
    )
    frame.to_parquet(tmp_path / "x.parquet")
    read = read_table(tmp_path / "x.parquet").frame
    assert list(read.columns) == ["ds", *frame.columns]
    assert list(read["ds"]) == list(times) and list(read["kind"]) == ["u", "v", "u", "u"]
    assert list(read["unique_id"].fillna("-")) == ["a", "-", "a", "b"]
    np.testing.assert_array_equal(read["pm2.5"], [1, 2, 3, 4])


def test_a_frame_by_region_and_time_is_a_long_table(tmp_path):
    frame = pd.DataFrame({"unique_id": list("aab"), "ds": pd.to_datetime(["2024-05-01"] * 3), "y": [1.0, 2.0, 3.0]})
    frame.set_index(["unique_id", "ds"]).to_parquet(tmp_path / "x.parquet")
    read = read_table(tmp_path / "x.parquet").frame
    assert list(read.columns) == ["unique_id", "ds", "y"] and list(read["unique_id"]) == list("aab")


@pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY", "PLAIN"])
def test_text_in_every_encoding_is_read(tmp_path, encoding):
    encodings = {"ds": encoding, "y": "PLAIN"}
    table = pa.table({"ds": ["2024", "2025"], "y": [1.0, 2.0]})
    pq.write_table(table, tmp_path / "x.parquet", use_dictionary=False, column_encoding=encodings)
    assert list(read_table(tmp_path / "x.parquet").frame["ds"]) == ["2024", "2025"]


def test_text_that_is_not_utf8_is_refused(tmp_path):
    """Arrow takes it as it is, and whoever asks for a cell finds out."""
    ids = pa.Array.from_buffers(pa.string(), 2, pa.array([b"a", b"\xb1"]).buffers())
    pq.write_table(pa.table({"unique_id": ids, "y": [1.0, 2.0]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"x\.parquet cannot be read as parquet \(.*ArrowInvalid: .*UTF8"):
        read_table(tmp_path / "x.parquet")
