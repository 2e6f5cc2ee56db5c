"""In: a Parquet file. Out: its plain columns as a table, once it is known that they fit into memory."""

import pathlib

import numpy as np
import pandas as pd

from gpdiff_jax.host_memory import check_unpacked


def read_parquet(path: pathlib.Path) -> pd.DataFrame:
    """Reads a Parquet file; its nested columns are left out.

    Runs and dictionaries let a small file stand for columns of any length, of which its own numbers tell no sizes. So
    text is first read as places in its dictionary, of which the size is known.

    Args:
      path: the file.

    Returns:
      Its table, with the index that pandas kept in it.

    Raises:
      InputError: the table takes more memory than this machine has.
      ImportError: pyarrow is not installed.
      ValueError, OSError: the file is damaged, or no Parquet; text of it is not UTF-8.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    def text_bytes(name: str) -> int:
        """Of a column's texts, each as often as it stands there."""
        total = 0
        for chunk in dictionaries.read([name]).column(0).chunks:
            chunk.dictionary.validate(full=True)  # that text is UTF-8
            lengths = np.asarray(pc.call_function("binary_length", [chunk.dictionary]))
            times = np.bincount(np.asarray(chunk.indices.drop_null()), minlength=len(lengths))
            total += int(lengths.astype(np.int64) @ times)
        return total

    with pq.ParquetFile(path) as file:
        schema = file.schema
        columns = [schema.column(index) for index in range(len(schema))]
        flat = [column for column in columns if column.name == column.path and column.max_repetition_level == 0]
        texts = [column.path for column in flat if column.physical_type == "BYTE_ARRAY"]
        rows = file.metadata.num_rows
        check_unpacked(path, 8 * rows * len(flat))
    with pq.ParquetFile(path, read_dictionary=texts) as dictionaries:
        check_unpacked(path, sum(map(text_bytes, texts)))
    return pd.read_parquet(path, columns=[column.path for column in flat])
