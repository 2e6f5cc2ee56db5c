"""In: luck, and good files of every kind that users bring. Out: broken and hostile ones, fed to what reads them.

A reader may return, or raise `InputError` in one line. Files are good ones that were changed: bits, pieces and words of
a file's bytes, or the arrays that are packed in it, for bytes of a compressed file hardly get past its checksum.
"""

import contextlib
import dataclasses
import io
import json
import pathlib
import pickle
import random
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa

from gpdiff_jax.analysis.summary import summarize_runs
from gpdiff_jax.cities import SimulationConfig, load_city, save_city, simulate_cities
from gpdiff_jax.errors import InputError
from gpdiff_jax.files import DAMAGE, read_npz
from gpdiff_jax.ingest import ReadingsConfig, city_from_tables, load_plain_pickle
from gpdiff_jax.run.settings import Settings

_WORDS = (
    *(b"nan", b"inf", b"-1", b"1e400", b"0x10", b"9" * 40, b"1,5", b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r"),
    *(b"\n\n", b'"', b"'", b";", b"\t", b",,,,", b"2024-02-30", b"0001-01-01", b"9999-12-31T23:59", b"24:00", b"-0"),
    *(b"../../etc/passwd", b"<script>", b"=1+1", b"T00:00+14:00", b"\xc3\x28", b"NaT", b"None", b"true", b"[]", b"{}"),
)
_VALUES = (np.nan, np.inf, -np.inf, -1.0, 0.0, 1e30, 1e300, 2**31, 2**63 - 1)
_ALONE = ("", "x" * 5000, "crowd", "speed", -5, 10**9, "2024-13-01", "\x00", "../x", "<b>")
_TYPES = ("f2", "f4", "f8", "i1", "i4", "i8", "u8", "?", "U3", "S2", "c8", "M8[m]", ">f4", "O")


def changed_bytes(content: bytes, luck: random.Random) -> bytes:
    """A file's bytes with one to four changes."""
    made = bytearray(content)
    for _ in range(luck.choice((1, 1, 1, 2, 4))):
        place, length = luck.randrange(len(made) + 1), luck.choice((1, 2, 8, 64))
        match luck.randrange(6):
            case 0 if made:
                made[place - 1] ^= 1 << luck.randrange(8)
            case 1:
                made[place:place] = luck.choice(_WORDS)
            case 2:
                made[place : place + length] = luck.choice(_WORDS)
            case 3:
                del made[place : place + length]
            case 4:
                other = luck.randrange(len(made) + 1)
                made[place:place] = made[other : other + length]
            case _:
                del made[place : len(made) if luck.random() < 0.2 else place + 1]
    return bytes(made)


def changed_arrays(arrays: dict[str, np.ndarray], luck: random.Random) -> dict[str, np.ndarray]:
    """Arrays of a file with one or two changes of values, type, shape or name."""
    made = {name: np.array(array) for name, array in arrays.items()}
    for _ in range(luck.randint(1, 2)):
        name = luck.choice(sorted(made))
        array = made[name]
        with np.errstate(all="ignore"):
            match luck.randrange(7):
                case 0:
                    made.pop(name)
                    if not made:
                        return {name: array}
                case 1 if array.size and array.dtype.kind in "fiu":
                    flat = array.astype(np.float64).ravel()
                    for _ in range(luck.choice((1, 1, 5, flat.size))):
                        flat[luck.randrange(flat.size)] = luck.choice(_VALUES)
                    made[name] = flat.reshape(array.shape).astype(array.dtype if luck.random() < 0.7 else np.float64)
                case 2:
                    try:
                        made[name] = array.astype(luck.choice(_TYPES))
                    except (ValueError, TypeError, RuntimeError):
                        made[name] = np.zeros(array.shape, "f4")
                case 3:
                    made[name] = luck.choice(
                        (array[None], array.ravel(), array[..., None], np.array(3.5), array.ravel()[:0])
                    )
                case 4 if array.ndim:
                    axis = luck.randrange(array.ndim)
                    longer = np.repeat(array, 2, axis)
                    made[name] = longer if luck.random() < 0.5 else array.take(range(array.shape[axis] // 2), axis)
                case 5:
                    made[luck.choice(("x", "../x", "values", "a/b", ""))] = array
                case _:
                    made[name] = np.asarray(luck.choice(_ALONE))
    return made


def npz_of(arrays: dict[str, np.ndarray]) -> bytes:
    """An npz file, of objects too."""
    content = io.BytesIO()
    held: Any = {f"_{name}" if name == "file" else name: array for name, array in arrays.items()}
    np.savez(content, **held)
    return content.getvalue()


@dataclasses.dataclass(frozen=True)
class Reader:
    """What reads, and what makes files for it."""

    read: Callable[[pathlib.Path], Any]
    file: str  # its name
    make: Callable[[random.Random], bytes]
    change: Callable[[bytes, random.Random], bytes] = changed_bytes  # of a file that may be changed already


def changed_archive(content: bytes, luck: random.Random) -> bytes:
    """An npz file with a change of what is packed in it, or of its bytes."""
    if luck.random() < 0.7:
        with contextlib.suppress(*DAMAGE, OSError, MemoryError), np.load(io.BytesIO(content)) as held:
            return npz_of(changed_arrays({name: held[name] for name in held.files}, luck))
    return changed_bytes(content, luck)


def _texts(*texts: str) -> Callable[[random.Random], bytes]:
    return lambda luck: changed_bytes(luck.choice(texts).encode(), luck)


def _archive(arrays: dict[str, np.ndarray]) -> Callable[[random.Random], bytes]:
    whole = npz_of(arrays)
    return lambda luck: changed_bytes(whole, luck) if luck.random() < 0.3 else npz_of(changed_arrays(arrays, luck))


def _readings(sites_file: str = "sites.csv", **options: Any) -> Callable[[pathlib.Path], Any]:
    def read(path: pathlib.Path) -> Any:
        sites = path.with_name(sites_file)
        return city_from_tables(path, name="mine", kind="crowd", sites=sites, config=ReadingsConfig(**options))

    return read


def _linked(**words: str) -> Callable[[pathlib.Path], Any]:
    def read(path: pathlib.Path) -> Any:
        readings = path.with_name("readings.csv")
        links: Any = {name: path for name in words}
        return city_from_tables(readings, name="mine", kind="crowd", **links)

    return read


def readers(folder: pathlib.Path) -> dict[str, Reader]:
    """Every reader of files that users bring, by name; good files that stand beside are written into the folder."""
    hours = [f"2024-05-{1 + hour // 24:02d}T{hour % 24:02d}:00" for hour in range(72)]
    regions = ("north", "south", "east")
    long = "unique_id,ds,y\n" + "".join(f"{r},{t},{(i * 7) % 13}\n" for i, t in enumerate(hours) for r in regions)
    wide = "time,north,south,east\n" + "".join(f"{t},{i % 5},{i % 7},{i % 3}\n" for i, t in enumerate(hours))
    sites = "unique_id,latitude,longitude\nnorth,52.1,4.3\nsouth,52.0,4.3\neast,52.05,4.4\n"
    edges = "from,to,weight\nnorth,south,0.5\nsouth,east,1\neast,north,0.25\n"
    matrix = "0,0.5,1\n0.5,0,0.2\n1,0.2,0\n"
    bare = "".join(f"{i % 5},{i % 7}.5,{i % 3}\n" for i in range(72))
    (folder / "readings.csv").write_text(long)
    (folder / "sites.csv").write_text(sites)
    numbered = sites.replace("north", "0").replace("south", "1").replace("east", "2")
    (folder / "numbered.csv").write_text(numbered)
    city = simulate_cities(SimulationConfig(cities=1, regions=4, days=7), seed=0)[0]
    save_city(folder / "whole.npz", city)
    with np.load(folder / "whole.npz") as held:
        city_arrays = {name: held[name] for name in held.files}
    series = {"data": np.arange(72 * 3, dtype=np.float32).reshape(72, 3) % 11}
    pickled = [pickle.dumps((["a", "b"], {"a": 0}, np.eye(3, dtype=np.float32)), protocol) for protocol in (2, 4)]
    run = folder / "run"
    run.mkdir()
    entry = {"mae": [1.0] * 6, "rmse": [1.0] * 6, "mae_mean": 1.0, "rmse_mean": 1.0, "seconds": 1.0}
    config = {"settings": Settings().computed(), "seed": 0, "cities": {}, "versions": {}, "format": 6}
    (run / "config.json").write_text(json.dumps(config))
    metrics = {"target": "x", "seed": 0, "unit": "u", "horizon_minutes": [60], "methods": {"last_value": entry}}
    arrays_of_no_times: Any = {"sites_file": "numbered.csv", "start": "unknown", "interval_minutes": 60}
    return {
        "city": Reader(load_city, "city.npz", _archive(city_arrays), changed_archive),
        "npz": Reader(read_npz, "method.npz", _archive({"forecast": np.zeros((3, 2, 6), np.float32)}), changed_archive),
        "long_table": Reader(_readings(), "table.csv", _texts(long, long.replace(",", ";"), "\ufeff" + long)),
        "wide_table": Reader(_readings(), "wide.csv", _texts(wide, wide.replace("T", " "), wide.replace("\n", "\r\n"))),
        "zoned_table": Reader(
            _readings(time_zone="Europe/Amsterdam", duplicates="mean"),
            "zoned.csv",
            _texts(long.replace(":00,", ":00+02:00,"), long),
        ),
        "sites": Reader(_linked(sites="sites"), "places.csv", _texts(sites, sites.replace(",", "\t"))),
        "edges": Reader(_linked(edges="edges"), "edges.csv", _texts(edges, edges.replace("weight", "cost"))),
        "matrix": Reader(_linked(matrix="matrix"), "matrix.csv", _texts(matrix)),
        "series": Reader(_readings(**arrays_of_no_times), "series.npz", _archive(series), changed_archive),
        "npy": Reader(_readings(**arrays_of_no_times), "series.npy", _npy(series["data"])),
        "bare_table": Reader(_readings(**arrays_of_no_times), "vel.csv", _texts(bare, "a,b,c\n" + bare)),
        "hdf5": Reader(_readings(), "frame.h5", _hdf5(folder, hours, regions)),
        "parquet": Reader(_readings(), "table.parquet", _parquet(hours, regions)),
        "pickle": Reader(load_plain_pickle, "adj.pkl", lambda luck: changed_bytes(luck.choice(pickled), luck)),
        "metrics": Reader(lambda path: summarize_runs([path.parent]), "run/metrics.json", _texts(json.dumps(metrics))),
    }


def _hdf5(folder: pathlib.Path, hours: Sequence[str], regions: Sequence[str]) -> Callable[[random.Random], bytes]:
    """Frames as pandas keeps them, some with parts of other files; changed by bytes, or part by part."""
    names = np.array([region.encode() for region in regions])
    arrays = {
        "axis0": names,
        "axis1": np.array(hours, "M8[ns]").astype(np.int64),
        "block0_items": names,
        "block0_values": np.arange(len(hours) * len(regions), dtype=np.float64).reshape(len(hours), -1) % 7,
    }

    def written(parts: dict[str, np.ndarray], luck: random.Random) -> bytes:
        content = io.BytesIO()
        with h5py.File(content, "w") as file:
            frame = file.create_group("df")
            for name, array in parts.items():
                with contextlib.suppress(TypeError, ValueError):  # what HDF5 cannot hold
                    frame[name] = array.astype("S") if array.dtype.kind == "U" else array
            if luck.random() < 0.2:
                frame[luck.choice(("axis2", "block1_values"))] = h5py.ExternalLink(
                    str(folder / "frame.h5"), "/df/axis0"
                )
            if luck.random() < 0.3 and "axis1" in frame:
                value = luck.choice(("datetime64[us]", "datetime64", "UTC", "x", 3, b"\xff"))
                frame["axis1"].attrs[luck.choice(("kind", "tz"))] = value
        return content.getvalue()

    whole = written(arrays, random.Random(1))

    def make(luck: random.Random) -> bytes:
        return changed_bytes(whole, luck) if luck.random() < 0.5 else written(changed_arrays(arrays, luck), luck)

    return make


def _parquet(hours: Sequence[str], regions: Sequence[str]) -> Callable[[random.Random], bytes]:
    """Long tables, of text or of times; changed by bytes, or column by column."""
    columns = {
        "unique_id": np.tile(np.array(regions), len(hours)),
        "ds": np.repeat(np.array(hours), len(regions)),
        "y": np.arange(len(hours) * len(regions), dtype=np.float64) % 5,
    }

    def written(parts: dict[str, np.ndarray]) -> bytes:
        content = io.BytesIO()
        table = pd.DataFrame({name: pd.Series(list(array) if array.ndim else [array]) for name, array in parts.items()})
        table.to_parquet(content)
        return content.getvalue()

    wholes = [written(columns), written(columns | {"ds": columns["ds"].astype("M8[s]")})]

    def make(luck: random.Random) -> bytes:
        if luck.random() < 0.5:
            return changed_bytes(luck.choice(wholes), luck)
        try:
            return written(changed_arrays(columns, luck))
        except (pa.ArrowException, TypeError, ValueError, OverflowError):  # what Parquet cannot hold
            return changed_bytes(wholes[0], luck)

    return make


def _npy(array: np.ndarray) -> Callable[[random.Random], bytes]:
    def make(luck: random.Random) -> bytes:
        content = io.BytesIO()
        np.save(content, array if luck.random() < 0.5 else next(iter(changed_arrays({"a": array}, luck).values())))
        return changed_bytes(content.getvalue(), luck) if luck.random() < 0.7 else content.getvalue()

    return make


def feed(
    reader: Reader, folder: pathlib.Path, luck: random.Random, inputs: int, deadline: float
) -> tuple[dict[str, int], dict[str, bytes]]:
    """Feeds a reader.

    Args:
      reader: what reads.
      folder: for its file.
      luck: of the changes.
      inputs: how many.
      deadline: of `time.monotonic`.

    Returns:
      How many it `read` and `refused`, and by what went wrong, the first input.
    """
    wrong: dict[str, bytes] = {}
    ends = {"read": 0, "refused": 0}
    for _ in range(inputs):
        if time.monotonic() > deadline:
            break
        with warnings.catch_warnings(action="ignore"):
            content = reader.make(luck)
        end, fault = judged(reader, folder, content)
        if end is not None:
            ends[end] += 1
        if fault is not None:
            wrong.setdefault(fault, content)
    return ends, wrong


def judged(reader: Reader, folder: pathlib.Path, content: bytes) -> tuple[str | None, str | None]:
    """Feeds a reader with one file.

    Args:
      reader: what reads.
      folder: for its file.
      content: of the file.

    Returns:
      Whether it was `read` or `refused`, None where it was neither; and what went wrong, if anything did.
    """
    path = folder / reader.file
    path.write_bytes(content)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            reader.read(path)
    except InputError as error:
        long = "\n" in str(error) or len(str(error)) > 2000
        return "refused", f"a message of many lines: {str(error)[:100]!r}" if long else None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "gpdiff_jax" in frame.filename][-1:]
        place = f"{pathlib.Path(ours[0].filename).name}:{ours[0].lineno}" if ours else ""
        return None, f"{type(error).__name__} at {place}: {str(error)[:120]}"
    # That a header is as Python 2 wrote it is NumPy's own note, and true.
    notes = [str(note.message) for note in said if "Python 2" not in str(note.message)]
    return "read", f"warning: {notes[0]}"[:200] if notes else None
