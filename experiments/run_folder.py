"""In: the output folder of a run and its settings. Out: a folder that belongs to this run, or one clear refusal."""

import csv
import io
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax

from experiments.folder_lock import lock_folder
from experiments.settings import Settings
from gpdiff_jax.cities import City
from gpdiff_jax.cities.digest import city_digest
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
    """Makes a folder to write into, or takes one that holds the same kind of thing already, for this process alone.

    Args:
      out_dir: the folder.
      mark: the file by which the kind is known.
      what: the kind, for the message.

    Returns:
      The absolute path.

    Raises:
      InputError: the path is a file, cannot be written, holds something else, or another process writes into it.
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
    lock_folder(folder, out_dir)
    return folder


def open_run_folder(out_dir: str, settings: Settings, cities: Sequence[City]) -> pathlib.Path:
    """Makes the folder of a run, or continues the run that it holds.

    What makes a run this run is what is computed: its settings and what is known of its cities. How it is computed, and
    from where, may be another when it is continued. Versions of packages that are others are said on standard error.

    Args:
      out_dir: the folder.
      settings: of the run; written as config.json.
      cities: what it reads; a run is not continued with other readings or facts.

    Returns:
      The absolute path.

    Raises:
      InputError: see `claim_folder`; or the folder holds another program's config.json, or a run that computes
        something else.
    """
    folder = claim_folder(out_dir, "config.json", "run")
    flags = json.loads(json.dumps(settings.computed()))
    digests = {city.name: city_digest(city) for city in cities}
    config = folder / "config.json"
    if not config.exists():
        content = {
            "flags": flags,
            "execution": settings.execution(),
            "cities": digests,
            "seed": settings.seed,
            "versions": _versions(),
            "device_kind": jax.devices()[0].device_kind,
            "device_count": jax.device_count(),
        }
        write_json(config, content)
        return folder
    try:
        content = json.loads(config.read_text())
        held_flags, held_digests, held_versions = content["flags"], content["cities"], content["versions"]
        if not all(isinstance(part, dict) for part in (held_flags, held_digests, held_versions)):
            raise TypeError
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(
            f"--out_dir {out_dir!r} holds a config.json that no run of this program wrote; name an empty or a new "
            "folder"
        ) from error
    if held_flags != flags:
        name = next(_differences(held_flags, flags))
        raise InputError(f"--out_dir {out_dir!r} holds a run with other settings ({name}); name another folder")
    for name in digests:
        if held_digests.get(name) != digests[name]:
            raise InputError(
                f"--out_dir {out_dir!r} holds a run on other readings or facts of city {name!r}; name another folder"
            )
    changed = [
        f"{name} {held_versions[name]}, now {version}"
        for name, version in _versions().items()
        if held_versions.get(name, version) != version
    ]
    if changed:
        print(f"this run was begun with other versions ({'; '.join(changed)}); its parts may differ", file=sys.stderr)
    return folder


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _differences(held: Any, wanted: Any, path: str = "") -> Iterator[str]:
    """Names every setting that differs, as "adapt.steps 120, now 60"."""
    if isinstance(held, dict) and isinstance(wanted, dict):
        for key in sorted(held.keys() | wanted.keys()):
            yield from _differences(held.get(key), wanted.get(key), f"{path}.{key}" if path else key)
    elif held != wanted:
        yield f"{path} {held}, now {wanted}"
