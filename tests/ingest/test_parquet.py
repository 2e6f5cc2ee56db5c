"""In: Parquet files, some of which are small and stand for tables without end. Out: tables, or one line."""

import numpy as np
import pandas as pd
import pytest

from gpdiff_jax import host_memory
from gpdiff_jax.errors import InputError
from gpdiff_jax.ingest.table_file import read_table

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.mark.parametrize("column", ["ds", "y"])
def test_a_small_file_that_stands_for_a_table_without_end_is_refused(tmp_path, monkeypatch, column):
    path = tmp_path / "x.parquet"
    rows = 20_000
    text = pa.repeat(pa.scalar("x" * (3000 if column == "ds" else 3)), rows)
    with pq.ParquetWriter(path, pa.schema([("ds", pa.string()), ("y", pa.float64())])) as file:
        for _ in range(2 if column == "ds" else 300):
            file.write_table(pa.table({"ds": text, "y": pa.repeat(pa.scalar(1.0), rows)}))
    assert path.stat().st_size < 500_000
    monkeypatch.setattr(host_memory, "host_bytes", lambda: 2**26)
    with pytest.raises(InputError, match=r"x\.parquet takes \d+ MiB, more than the 64 MiB of memory that are free"):
        read_table(path)


def test_columns_keep_their_types_and_nested_ones_are_left_out(tmp_path):
    times = pd.date_range("2024-05-01", periods=4, freq="h", tz="Europe/Amsterdam")
    place = [{"x": 1.0, "y": 2.0}] * 4
    table = {"unique_id": ["a", None, "a", "b"], "pm2.5": [1, 2, 3, 4], "place": place, "many": [[1, 2]] * 4}
    frame = pd.DataFrame({"kind": pd.Categorical(["u", "v", "u", "u"]), **table}, index=times.rename("ds"))
    frame.to_parquet(tmp_path / "x.parquet")
    read = read_table(tmp_path / "x.parquet").frame
    assert list(read.columns) == ["ds", "kind", "unique_id", "pm2.5"]
    assert list(read["ds"]) == list(times) and list(read["kind"]) == ["u", "v", "u", "u"]
    assert list(read["unique_id"].fillna("-")) == ["a", "-", "a", "b"]
    np.testing.assert_array_equal(read["pm2.5"], [1, 2, 3, 4])


def test_text_that_is_not_utf8_is_refused(tmp_path):
    """Arrow takes it as it is, and whoever asks for a cell finds out."""
    ids = pa.Array.from_buffers(pa.string(), 2, pa.array([b"a", b"\xb1"]).buffers())
    pq.write_table(pa.table({"unique_id": ids, "y": [1.0, 2.0]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"x\.parquet cannot be read as parquet \(ArrowInvalid: .*UTF8"):
        read_table(tmp_path / "x.parquet")
