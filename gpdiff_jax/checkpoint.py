"""In: a pytree of arrays and a few facts. Out: a folder that holds both, whole or not at all, and back."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from gpdiff_jax.errors import InputError


def save_arrays(folder: pathlib.Path, arrays: dict, facts: dict) -> None:
    """Writes a pytree of arrays with orbax and, as its metadata, JSON facts; the folder appears when all is written."""
    ocp.save(
        _absolute(folder),
        jax.tree.map(np.asarray, arrays),
        custom_metadata={"facts": json.dumps(facts)},
        overwrite=True,
    )


def load_arrays(folder: pathlib.Path, version: int, what: str) -> tuple[dict, dict]:
    """Reads what `save_arrays` wrote.

    Args:
      folder: where it lies.
      version: the format that this library reads.
      what: the thing's name, for messages.

    Returns:
      The pytree, and the facts.

    Raises:
      InputError: missing, damaged, or of another format.
    """
    place = _absolute(folder)
    if not place.is_dir():
        raise InputError(f"no {what} at {str(place)!r}; name the folder that holds one")
    try:
        metadata = ocp.metadata(place)
        custom: Any = metadata.custom_metadata
        facts = json.loads(custom["facts"])
        arrays = ocp.load(place)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(
            f"the {what} at {str(place)!r} cannot be read ({type(error).__name__}); delete it and make it again"
        ) from error
    if facts.get("format") != version:
        raise InputError(f"the {what} at {str(place)!r} has format {facts.get('format')}, not {version}; make it again")
    return arrays, facts


def _absolute(folder: pathlib.Path) -> Any:
    # Typed loosely: orbax's own PathLike does not admit pathlib's Path, which it takes.
    return pathlib.Path(folder).expanduser().resolve()
