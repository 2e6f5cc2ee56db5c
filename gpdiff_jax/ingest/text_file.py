"""In: a text file, perhaps compressed. Out: its lines or cells, by the encoding and separator that it names itself."""

import io
import pathlib
import re
import zipfile
from typing import Any, NamedTuple

import pandas as pd
from pandas.io.common import get_handle

from gpdiff_jax.errors import InputError
from gpdiff_jax.files import DAMAGE, check_members
from gpdiff_jax.host_memory import BoundedReader

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_BYTES = 4096  # of the begin of a file, in which its first line is looked at
# Bytes that pandas takes for every cell of a table, beside its text; measured: 1.8 bytes for each of the text where
# cells are of 8 bytes, 5 where they are of 2, 12 where they are empty.
_BYTES_OF_A_CELL = 8
_CELL_ENDS = (b",", b";", b"\t", b"\n")
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # byte order marks
_ZIPPED = b"PK\x03\x04"
_SEPARATOR_LINE = re.compile(r'\ufeff?"?sep=(.)"? *(?:[\r\n]|$)', re.IGNORECASE)  # as Excel reads one
_TAR = re.compile(r"\.(tar(\.\w+)?|tgz|tbz2?|txz)$", re.IGNORECASE)
_WRONG = (*DAMAGE, OSError, pd.errors.ParserError)


class TextForm(NamedTuple):
    """What the begin of a file says of how it is written."""

    encoding: str
    separator: str | None  # that of a first line `sep=;`; None where there is no such line


def check_file(path: pathlib.Path) -> None:
    """Raises `InputError` where there is no file, one without a byte, or an archive that is no table."""
    if not path.is_file():
        raise InputError(f"{str(path)!r} is no file; check the path")
    if path.stat().st_size == 0:
        raise _empty(path)
    if _TAR.search(path.name):
        raise InputError(f"{path} is a tar archive; unpack it, and give the table that it holds")
    if path.suffix.lower() == ".zip":
        try:
            with zipfile.ZipFile(path) as archive:
                check_members(archive, path)
                names = archive.namelist()
                if len(names) != 1 or names[0].endswith("/"):
                    raise InputError(f"{path} holds {len(names)} files and folders; unpack it, and give the table")
        except (*DAMAGE, OSError) as error:
            raise error if isinstance(error, InputError) else unreadable(path, error) from None


def text_form(path: pathlib.Path) -> TextForm:
    """Sees how a text file is written: in UTF-8, or in UTF-16 where its byte order mark says so.

    Args:
      path: the file; compressed ones are opened as pandas opens them, by their names.

    Returns:
      The encoding, and the separator of a first line as `sep=;`.

    Raises:
      InputError: the file is empty, cannot be read, is no text, or names a separator that is none of the three.
    """
    check_file(path)
    try:
        with get_handle(path, "rb", compression="infer", is_text=False) as opened:
            head: Any = opened.handle.read(_BYTES)
    except _WRONG as error:
        raise unreadable(path, error) from None
    if head.startswith(_ZIPPED):
        raise InputError(f'{path} is a workbook or a zip archive; save its table as "CSV UTF-8", or unpack it')
    encoding = "utf-16" if head.startswith(_UTF_16) else "utf-8-sig"
    if encoding != "utf-16" and b"\0" in head:
        raise _not_utf8(path, 0)
    line = _SEPARATOR_LINE.match(head.decode(encoding, errors="ignore"))
    if line is not None and line[1] not in SEPARATORS:
        raise InputError(f"{path} has the first line 'sep={line[1]}'; separate cells by commas, semicolons or tabs")
    return TextForm(encoding, None if line is None else line[1])


def read_cells(path: pathlib.Path, separator: str, **options: Any) -> pd.DataFrame:
    """Reads a text file by `pandas.read_csv`, every cell as text; raises `InputError` where that fails."""
    form = text_form(path)
    try:
        with get_handle(path, "rb", compression="infer", is_text=False) as opened:
            stream = io.BufferedReader(BoundedReader(opened.handle, path, _bytes_taken))
            return pd.read_csv(
                stream, sep=separator, header=None, dtype=str, keep_default_na=False, encoding=form.encoding, **options
            )
    except InputError:
        raise
    except pd.errors.EmptyDataError:
        raise _empty(path) from None
    except UnicodeDecodeError as error:
        if form.encoding == "utf-16":
            raise InputError(f'{path} begins as UTF-16 and is none; save it as "CSV UTF-8"') from None
        raise _not_utf8(path, error.object[error.start]) from None
    except _WRONG as error:
        raise unreadable(path, error) from None


def _bytes_taken(content: bytes) -> int:
    """What pandas takes for a piece of a table."""
    return len(content) + _BYTES_OF_A_CELL * sum(map(content.count, _CELL_ENDS))


def text_lines(path: pathlib.Path, count: int | None = None) -> list[str]:
    """The first lines of a text file, or all, as they are; compressed ones are opened as tables are."""
    # Of a separator that no text holds, every line is one cell.
    table = read_cells(path, "\x01", names=["line"], nrows=count, quoting=3, skip_blank_lines=False)
    return list(table["line"])


def unreadable(path: pathlib.Path, error: Exception) -> InputError:
    """What to say of a file of which reading ended with an error."""
    if isinstance(error, OSError) and error.strerror:
        return InputError(f"{path} cannot be read ({error.strerror}); check the file and its permissions")
    reason = " ".join(str(error).split())[:160]
    kind = path.suffix.lstrip(".") or "CSV"
    return InputError(f"{path} cannot be read as {kind} ({type(error).__name__}: {reason}); check the file")


def _empty(path: pathlib.Path) -> InputError:
    return InputError(f"{path} is empty; export it again")


def _not_utf8(path: pathlib.Path, byte: int) -> InputError:
    return InputError(f'{path} is not UTF-8 text (it has the byte 0x{byte:02x}); save it as "CSV UTF-8"')
