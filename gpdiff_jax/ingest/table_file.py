"""In: a file of a table, CSV or Parquet. Out: its cells as they are written, and its numbers."""

import itertools
import pathlib
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from gpdiff_jax.errors import InputError
from gpdiff_jax.files import DAMAGE
from gpdiff_jax.ingest.parquet import read_parquet
from gpdiff_jax.ingest.text_file import SEPARATORS, check_file, read_cells, text_form, text_lines, unreadable

_HEAD = 50  # lines from which the separator is seen
_QUOTED = re.compile(r'"[^"]*"')
# First lines that are separated by something else, without and with names.
_OTHERWISE = (r"[\d.]+(?:[|:\s]+[\d.]+)+", r"[^|:\s]+(?:[|:\s]+[^|:\s]+)+")
_NUMBER = re.compile(r"\s*([+-]?\d*[.,]?\d+([eE][+-]?\d+)?)?\s*")
_MARKED = r"[+-]?\d*[.,]\d.*"  # a number with a comma or a point
_GROUPED = r"[+-]?[1-9]\d{0,2}(?:[.,]\d{3})+"  # one that may be whole, with marks between its thousands

# One that has marks between its thousands, all alike: 1,233 or 1 233.5; its whole part and its decimals.
_THOUSANDS = re.compile(r"([+-]?\d{1,3}([.,'\u2019\s])\d{3}(?:\2\d{3})*)(?:(?!\2)[.,](\d+))?")


class Source(NamedTuple):
    """Where a table comes from, to be named where something in it is wrong."""

    path: pathlib.Path | None = None
    separator: str | None = None  # of its cells; None where it is no CSV
    above: int = 0  # rows of the file above the first of the table

    def error(self, text: str) -> InputError:
        """What is wrong, behind the name of the file."""
        return InputError(text if self.path is None else f"{self.path}: {text}")

    def row(self, index: int | np.integer) -> int:
        """The row in the file of a row of the table, counted from 1, with the header and with empty lines."""
        index = int(index) + self.above
        if self.path is None or self.separator is None:
            return index + 1
        blank = " " if self.separator == "\t" else None
        filled = (number for number, line in enumerate(text_lines(self.path), 1) if line.strip(blank))
        return next(itertools.islice(filled, index, None), index + 1)


UNNAMED = Source()  # of what comes from no file


class TableFile(NamedTuple):
    """A table as its file has it."""

    frame: pd.DataFrame
    source: Source


def read_table(path: pathlib.Path, *, header: bool = True) -> TableFile:
    """Reads CSV, all of it as text, or Parquet.

    Args:
      path: the file; a CSV is UTF-8, or UTF-16 with a byte order mark, its cells separated by commas, semicolons or
        tabs, see `separator_of`.
      header: whether a CSV's first line names the columns; else they are "0", "1", ...

    Returns:
      The table. A first column without a name that counts the rows is left out.

    Raises:
      InputError: no such file, one that is empty, neither, damaged or not UTF-8, no row, or two columns of one name.
    """
    check_file(path)
    above = 0
    try:
        if path.suffix == ".parquet":
            separator = None
            table = read_parquet(path)
            if isinstance(table.index, pd.MultiIndex):
                table = table.reset_index()
            elif not isinstance(table.index, pd.RangeIndex):
                table = table.reset_index(names=table.index.name or "ds")
        else:
            separator = separator_of(path, header=header)
            above = int(text_form(path).separator is not None)
            table = read_cells(path, separator, skiprows=above, skipinitialspace=True)
            if header:
                names = [str(name) for name in table.iloc[0]]
                table = table.iloc[1:].reset_index(drop=True).set_axis(names, axis=1)
                above += 1
    except InputError:
        raise
    except (*DAMAGE, OSError) as error:
        raise unreadable(path, error) from None
    if table.empty:
        raise InputError(f"{path} holds no row; give a table with readings")
    names = [name_of(str(name)) for name in table.columns]
    table.columns = names
    if again := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{path} has two columns {again!r}; rename one")
    if header and names[0] == "" and np.array_equal(table[""], table.index.astype(str)):
        table = table.drop(columns="")
    return TableFile(table, Source(path, separator, above))


def separator_of(path: pathlib.Path, *, header: bool = True) -> str:
    """What separates the cells of a CSV file: the one of commas, semicolons and tabs that its first line has.

    A first line as `sep=;`, which Excel reads, says it. Where the first line has several, it is the one that all lines
    have as often; of several such, the one between which numbers lie.

    Args:
      path: the file, also compressed.
      header: whether its first line names the columns.

    Returns:
      "," or ";" or a tab.

    Raises:
      InputError: the file cannot be read, or its separator cannot be told.
    """
    if (named := text_form(path).separator) is not None:
        return named
    lines = [line for line in text_lines(path, _HEAD) if line.strip()]
    bare = [_QUOTED.sub("", line) for line in lines]
    first = bare[0] if bare else ""
    able = [mark for mark in SEPARATORS if mark in first]
    if len(able) > 1:
        able = [mark for mark in able if all(line.count(mark) == first.count(mark) for line in bare)]
    if len(able) > 1:
        able = [mark for mark in able if _is_between_numbers(mark, bare[1:] if header else bare)]
    other = re.fullmatch(_OTHERWISE[header], first.strip()) is not None
    if len(able) == 1 or not (able or other or set(first) & set(SEPARATORS)):
        return able[0] if able else ","
    raise InputError(
        f"{path} has the first line {lines[0].strip()[:60]!r}, by which it cannot be told what separates its cells; "
        "separate them by commas, semicolons or tabs, and quote cells that hold one"
    )


def _is_between_numbers(mark: str, lines: list[str]) -> bool:
    """Whether a number or nothing is last in every line, and no cell holds another separator but within a number."""
    for line in lines:
        *others, last = line.split(mark)
        if not _NUMBER.fullmatch(last):
            return False
        if any(other in cell and not _NUMBER.fullmatch(cell) for cell in others for other in set(SEPARATORS) - {mark}):
            return False
    return bool(lines)


def name_of(text: str) -> str:
    """A name without blanks around it, in which letters with marks, as ö, are one sign however they are written."""
    return unicodedata.normalize("NFC", text.strip())


def names_in(column: pd.Series) -> pd.Series:
    """The names of a column; see `name_of`."""
    return column.astype("string").str.strip().str.normalize("NFC")


def column_of(table: TableFile, name: str) -> pd.Series:
    """A column; raises `InputError` where the table has two of that name."""
    column = table.frame[name]
    if not isinstance(column, pd.Series):
        raise table.source.error(f"there are two columns {name!r}; rename one")
    return column


def numbers(table: TableFile, names: Sequence[str], *, thousands: bool = True) -> Float[np.ndarray, "X K"]:
    """Columns as float64; an empty cell, and what stands for one, is NaN.

    In a table that is not separated by commas, a comma within a number is decimal.

    Args:
      table: as `read_table` gives it.
      names: of the columns.
      thousands: whether numbers may be so large that they are written with marks between their thousands.

    Returns:
      float64 [X, K].

    Raises:
      InputError: any other text; numbers that may be written with decimal or with thousands marks.
    """
    columns = [column_of(table, name) for name in names]
    if table.source.separator not in (",", None):
        columns = [column.astype("string").str.strip() for column in columns]
        _check_marks(table.source, columns, thousands)
        columns = [column.str.replace(",", ".", regex=False) for column in columns]
    return np.stack([_numbers(column, table.source) for column in columns], axis=1)


def _check_marks(source: Source, columns: list[pd.Series], thousands: bool) -> None:
    """Refuses numbers with both commas and points, and those of which all may have them between their thousands."""
    found = [str(cell) for column in columns for cell in column if not pd.isna(cell)]
    cells = [cell for cell in found if re.fullmatch(_MARKED, cell)]
    comma, point = ([cell for cell in cells if mark in cell] for mark in ",.")
    if comma and point:
        raise source.error(
            f"the numbers {comma[0]!r} and {point[0]!r} have one a comma and one a point; write decimals alike, and "
            "thousands without a mark"
        )
    if thousands and cells and all(re.fullmatch(_GROUPED, cell) for cell in cells):
        raise source.error(
            f"the number {cells[0]!r} has a mark of which it cannot be told whether it is decimal or between "
            "thousands, as in all its numbers; write thousands without a mark, or decimals with other than three digits"
        )


def _numbers(column: pd.Series, source: Source) -> Float[np.ndarray, " X"]:
    if pd.api.types.is_numeric_dtype(column.dtype):
        read = column.to_numpy(np.float64, na_value=np.nan)
        if np.isinf(read).any():
            row = int(np.argmax(np.isinf(read)))
            raise source.error(
                f"the reading inf (row {source.row(row)}, column {column.name!r}) is no number; correct it"
            )
        return read
    text = column.astype("string").str.strip().fillna("")
    missing = text.str.lower().isin(["", "nan", "na", "n/a", "null", "none"]).to_numpy(bool)
    read = np.asarray(pd.to_numeric(text.where(~missing), errors="coerce"), np.float64)
    wrong = ~missing & ~np.isfinite(read)
    if wrong.any():
        row = int(np.argmax(wrong))
        remedy = "correct it, or leave it empty where it is missing"
        if (marked := _THOUSANDS.fullmatch(text.iloc[row])) is not None:
            plain = re.sub(r"[^\d+-]", "", marked[1]) + (f".{marked[3]}" if marked[3] else "")
            remedy = f"it seems to have marks between its thousands: write {plain}"
        raise source.error(
            f"the reading {text.iloc[row]!r} (row {source.row(row)}, column {column.name!r}) is no number; {remedy}"
        )
    return read
