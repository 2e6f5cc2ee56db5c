"""In: a pytree of arrays and a few facts. Out: a folder that holds both, whole or not at all, and back."""

import errno
import functools
import json
import math
import os
import pathlib
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from gpdiff_jax.errors import InputError, is_disk_full, is_out_of_memory
from gpdiff_jax.files import user_path
from gpdiff_jax.host_memory import check_unpacked
from gpdiff_jax.hosts import check_devices, is_first
from gpdiff_jax.training.digest import digest_of
from gpdiff_jax.training.exchange import ask_first
from gpdiff_jax.training.orbax_calls import calling_orbax


def save_arrays(folder: pathlib.Path, arrays: dict, facts: dict) -> None:
    """Writes a pytree of arrays with orbax and, as its metadata, JSON facts; the folder appears when all is written.

    Of several hosts the first writes.

    Args:
      folder: where; what it holds is replaced.
      arrays: nested dicts and lists of arrays.
      facts: JSON values.

    Raises:
      OSError: the disk is full.
    """
    if not is_first():
        return
    place = _absolute(folder)
    host = jax.tree.map(np.asarray, arrays)
    metadata: Any = {"facts": json.dumps(facts), "sha256": digest_of("", host)}
    try:
        with calling_orbax():
            ocp.save(place, host, custom_metadata=metadata, overwrite=True)
    except Exception as error:
        raise_if_full(error, place)
        raise


def in_half(tree: Any) -> Any:
    """Arrays of 32 bits with 16, on the host.

    Raises:
      InputError: a value is too large, or not finite.
    """

    def halve(leaf: Any) -> np.ndarray:
        wide = np.asarray(leaf)
        with np.errstate(over="ignore"):
            half = wide.astype(np.float16)
        if not np.isfinite(half).all():
            most = float(np.abs(wide[np.isfinite(wide)]).max(initial=0.0))
            finite = np.isfinite(wide).all()
            what = f"a value of {most:.6g} is too large for 16 bits" if finite else "not all values are finite"
            raise InputError(f"{what}; save the values with 32 bits")
        return half

    return jax.tree.map(halve, tree)


def in_single(tree: Any) -> Any:
    """Arrays of 16 bits with 32; others as they are."""
    return jax.tree.map(
        lambda leaf: leaf.astype(np.float32) if getattr(leaf, "dtype", None) == np.float16 else leaf, tree
    )


def raise_if_full(error: Exception, place: pathlib.Path) -> None:
    """Raises the system's own error where a writer's exception says, many lines long, that the disk is full."""
    if is_disk_full(error):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place)) from error


def is_filled(folder: pathlib.Path) -> bool:
    """Whether there is a folder with anything in it, as the first host sees it.

    An empty one is where something is to be written.
    """
    return ask_first(lambda: folder.is_dir() and any(folder.iterdir()))


def load_arrays(folder: pathlib.Path, version: int, what: str) -> tuple[dict, dict]:
    """Reads what `save_arrays` wrote; of several hosts the first reads for all.

    Args:
      folder: where it lies.
      version: the format that this library reads.
      what: the thing's name, for messages.

    Returns:
      The pytree, and the facts.

    Raises:
      InputError: missing, something else, damaged, or of another format.
    """
    return ask_first(functools.partial(_load, folder, version, what))


def _load(folder: pathlib.Path, version: int, what: str) -> tuple[dict, dict]:
    place = _absolute(folder)
    if not place.is_dir():
        raise InputError(f"no {what} at {str(place)!r}; name the folder that holds one")
    if not (place / MARK).is_file():
        within = sorted(entry.name for entry in place.iterdir() if (entry / MARK).is_file())
        held = sorted(entry.name for entry in place.iterdir() if not entry.name.startswith("."))
        found = f"it holds {', '.join(held[:3])}" + (", ..." if len(held) > 3 else "") if held else "it is empty"
        near = what.replace(" ", "_")
        hint = f"did you mean {str(place / near)!r}?" if near in within or (place / near).is_dir() else _ELSEWHERE
        raise InputError(f"{str(place)!r} is no {what}: {found}; {hint}")
    check_devices()  # an error of theirs is no damage
    try:
        with calling_orbax():
            metadata = ocp.metadata(place)
            custom: Any = metadata.custom_metadata
            facts = json.loads(custom["facts"])
            if not isinstance(facts, dict):
                raise TypeError
            check_unpacked(f"the {what} at {str(place)!r}", _said_bytes(metadata.metadata))
            arrays = ocp.load(place)
        # Orbax sees damage to what says where the arrays are, but not to the arrays.
        if custom.get("sha256", written := digest_of("", arrays)) != written:
            raise ValueError("not what was written")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if is_out_of_memory(error) or isinstance(error, InputError):
            raise
        raise InputError(f"the {what} at {str(place)!r} is damaged ({type(error).__name__}); {_AGAIN}") from error
    if facts.get("format") != version:
        raise InputError(
            f"the {what} at {str(place)!r} has format {facts.get('format')}, and this version reads {version}; name "
            "another folder, and make it again there"
        )
    return arrays, facts


def _said_bytes(arrays: Any) -> int:
    """Bytes that arrays take by what is said of them; a chunk is read whole, however little of it there is."""
    total = 0
    for leaf in jax.tree.leaves(arrays):
        if getattr(leaf, "shape", None) is not None:
            chunk = getattr(getattr(leaf, "storage_metadata", None), "chunk_shape", None) or ()
            total += max(math.prod(leaf.shape), math.prod(chunk)) * np.dtype(leaf.dtype).itemsize
    return total


MARK = "_CHECKPOINT_METADATA"  # which orbax writes into every folder of its own
_ELSEWHERE = "name the folder that holds one"
_AGAIN = "use a copy of it; in the folder of a run, move it away, and the run makes it again"


def _absolute(folder: pathlib.Path) -> Any:
    # Typed loosely: orbax's own PathLike does not admit pathlib's Path, which it takes.
    return user_path(folder).resolve()
