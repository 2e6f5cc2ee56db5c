"""In: the output folder of a run and its settings. Out: a folder that belongs to this run, or one clear refusal."""

import csv
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np

from experiments.settings import Settings
from gpdiff_jax.cities import City
from gpdiff_jax.errors import InputError
from gpdiff_jax.files import write_atomically

_PACKAGES = ("gpdiff_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "jraph", "numpy")


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes JSON whole or not at all; NaN is refused."""
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def write_csv(path: pathlib.Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a table whole or not at all; None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def claim_folder(out_dir: str, mark: str, what: str) -> pathlib.Path:
    """Makes a folder to write into, or takes one that holds the same kind of thing already.

    Args:
      out_dir: the folder.
      mark: the file by which the kind is known.
      what: the kind, for the message.

    Returns:
      The absolute path.

    Raises:
      InputError: the path is a file, cannot be written, or holds something else.
    """
    folder = pathlib.Path(out_dir).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        entries = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError
    except OSError as error:
        reason = error.strerror or "no permission"
        raise InputError(f"--out_dir {out_dir!r} cannot be written ({reason}); name a folder of your own") from error
    if entries and mark not in entries:
        raise InputError(f"--out_dir {out_dir!r} holds {entries[0]!r} but no {what}; name an empty or a new folder")
    return folder


def open_run_folder(out_dir: str, settings: Settings, cities: Sequence[City]) -> pathlib.Path:
    """Makes the folder of a run, or continues the run that it holds.

    Args:
      out_dir: the folder.
      settings: of the run; written as config.json.
      cities: what it reads; a run is not continued with other readings.

    Returns:
      The absolute path.

    Raises:
      InputError: the path is a file, cannot be written, holds something else, or a run with other settings.
    """
    folder = claim_folder(out_dir, "config.json", "run")
    flags = json.loads(json.dumps(settings.as_json()))
    digests = {city.name: _digest(city) for city in cities}
    wanted = {**flags, "cities": digests}
    config = folder / "config.json"
    if config.exists():
        try:
            content = json.loads(config.read_text())
            held = {**content["flags"], "cities": content["cities"]}
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise InputError(f"{str(config)!r} cannot be read; remove the folder or name another --out_dir") from error
        if held != wanted:
            name = next(_differences(held, wanted))
            raise InputError(f"--out_dir {out_dir!r} holds a run with other settings ({name}); name another folder")
        return folder
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    write_json(
        config,
        {
            "flags": flags,
            "cities": digests,
            "seed": settings.seed,
            "versions": versions,
            "device_kind": jax.devices()[0].device_kind,
            "device_count": jax.device_count(),
        },
    )
    return folder


def _digest(city: City) -> str:
    """SHA-256 of what a run reads of a city."""
    digest = hashlib.sha256(f"{city.node_ids} {city.interval_minutes} {city.start}".encode())
    for array in (city.values, city.senders, city.receivers, city.weights, city.latitude, city.longitude):
        digest.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _differences(held: Any, wanted: Any, path: str = "") -> Iterator[str]:
    """Names every setting that differs, as "adapt.steps 120, now 60"."""
    if isinstance(held, dict) and isinstance(wanted, dict):
        for key in sorted(held.keys() | wanted.keys()):
            yield from _differences(held.get(key), wanted.get(key), f"{path}.{key}" if path else key)
    elif held != wanted:
        yield f"{path} {held}, now {wanted}"
