"""In: the output folder of a run and its settings. Out: a folder that belongs to this run, or one clear refusal."""

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

import jax

from gpdiff_jax.cities import City
from gpdiff_jax.cities.digest import city_digest
from gpdiff_jax.errors import InputError
from gpdiff_jax.files import read_json, user_path, write_json
from gpdiff_jax.folder_lock import lock_folder, unlock_folder
from gpdiff_jax.run.settings import Settings
from gpdiff_jax.training.exchange import ask_first, check_agreed

_FORMAT = 11
_AGREED = ("cities", "model_sha256", "versions")
_PACKAGES = ("gpdiff_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "jraph", "numpy")


def claim_folder(name: str | os.PathLike[str], mark: str, what: str) -> pathlib.Path:
    """Makes a folder to write into, or takes one that holds the same kind of thing already, for this process alone.

    Args:
      name: of the folder; `~` is the home folder.
      mark: the file by which the kind is known.
      what: the kind, for the message.

    Returns:
      The absolute path.

    Raises:
      InputError: the path is a file, cannot be written, holds something else, or another process writes into it.
    """
    folder = user_path(name).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        entries = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError
    except OSError as error:
        reason = error.strerror or "no permission"
        raise InputError(f"folder {str(name)!r} cannot be written ({reason}); name a folder of your own") from error
    if entries and mark not in entries:
        raise InputError(f"folder {str(name)!r} holds {entries[0]!r} but no {what}; name an empty or a new folder")
    lock_folder(folder)
    return folder


def open_run_folder(
    name: str | os.PathLike[str], settings: Settings, cities: Sequence[City], model_digest: str | None = None
) -> pathlib.Path:
    """Makes the folder of a run, or continues the run that it holds.

    What makes a run this run is what is computed: its settings and what is known of its cities. How it is computed, and
    from where, may be another when it is continued. Versions of packages that are others are said on standard error.

    Args:
      name: of the folder.
      settings: of the run; written as config.json.
      cities: what it reads; a run is not continued with other readings or facts.
      model_digest: of the operations of a model that is not built in; a run is not continued with another model.

    Returns:
      The absolute path.

    Raises:
      InputError: see `claim_folder`; or the folder holds another program's config.json, or a run that computes
        something else; or the hosts of a job bring different things.
    """
    content = {
        "format": _FORMAT,
        "settings": json.loads(json.dumps(settings.computed())),
        "execution": settings.execution(),
        "cities": {city.name: city_digest(city) for city in cities},
        "model_sha256": model_digest,
        "seed": settings.seed,
        "versions": _versions(),
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
    }
    every = dataclasses.asdict(settings) | {"data_dir": None}
    check_agreed({"settings": json.loads(json.dumps(every)), **{part: content[part] for part in _AGREED}})
    return pathlib.Path(ask_first(lambda: str(_open(name, content))))


def _open(name: str | os.PathLike[str], content: dict[str, Any]) -> pathlib.Path:
    folder = claim_folder(name, "config.json", "run")
    config = folder / "config.json"
    try:
        if config.exists():
            _check_same(_read_config(config, str(name)), content, str(name))
        else:
            write_json(config, content)
    except BaseException:
        unlock_folder(folder)
        raise
    return folder


def _read_config(path: pathlib.Path, name: str) -> dict[str, Any]:
    """What a config.json holds; raises `InputError` where no run wrote it."""
    try:
        held = read_json(path)
        if not all(isinstance(held[part], dict) for part in ("settings", "cities", "versions")):
            raise TypeError
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(
            f"folder {name!r} holds a config.json that no run of this program wrote; name an empty or a new folder"
        ) from error
    return held


def _check_same(held: dict[str, Any], content: dict[str, Any], name: str) -> None:
    """Raises `InputError` where a folder's config.json is that of another run; says where versions differ."""
    if held.get("format") != _FORMAT:
        raise InputError(f"folder {name!r} holds a run of another version of this program; name another folder")
    if held["settings"] != content["settings"]:
        setting = next(differences(held["settings"], content["settings"]))
        raise InputError(f"folder {name!r} holds a run with other settings ({setting}); name another folder")
    for city, digest in content["cities"].items():
        if held["cities"].get(city) != digest:
            raise InputError(
                f"folder {name!r} holds a run on other readings or facts of city {city!r}; name another folder"
            )
    changed = [
        f"{package} {held['versions'][package]}, now {version}"
        for package, version in content["versions"].items()
        if held["versions"].get(package, version) != version
    ]
    if held.get("model_sha256") != content["model_sha256"] and not changed:
        # With another JAX the same model has other operations.
        raise InputError(f"folder {name!r} holds a run of another model of that name; name another folder")
    if changed:
        print(f"this run was begun with other versions ({'; '.join(changed)}); its parts may differ", file=sys.stderr)


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def differences(held: Any, wanted: Any, path: str = "") -> Iterator[str]:
    """Names every place where two JSON values differ, as "adapt.steps 120, now 60"."""
    if isinstance(held, dict) and isinstance(wanted, dict):
        for key in sorted(held.keys() | wanted.keys()):
            yield from differences(held.get(key), wanted.get(key), f"{path}.{key}" if path else key)
    elif held != wanted:
        yield f"{path} {held}, now {wanted}"
