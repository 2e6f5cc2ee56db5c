"""In: arrays and facts of a folder, which another program may have written. Out: one line where they have another form.

`storage.load_arrays` finds what is damaged; this finds what is whole and was never written by this version.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from gpdiff_jax.errors import InputError

Shape = tuple[int | None, ...]  # None stands for any number above 0
ABSENT: Any = object()
_MOST_TOLD = 300
_KINDS = {"f": "floating-point numbers", "i": "whole numbers", "u": "whole numbers without a sign"}
_NOT_OF_THE_FORM = (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError)


@contextlib.contextmanager
def building(what: str, folder: str | os.PathLike[str]) -> Iterator[None]:
    """Turns every complaint about what was read into an `InputError` that names the folder.

    Args:
      what: the thing's name.
      folder: where it lies.
    """
    try:
        yield
    except _NOT_OF_THE_FORM as error:
        place = repr(str(folder))
        if isinstance(error, InputError):
            if place in str(error):
                raise
            told = str(error)
        else:
            told = f"{type(error).__name__}: {error}"
        told = " ".join(told.split())
        told = told if len(told) <= _MOST_TOLD else f"{told[:_MOST_TOLD]}..."
        raise InputError(
            f"the {what} at {place} is not what this version writes ({told}); make it again with this version"
        ) from error


def shapes_of(tree: Any, leading: Shape = ()) -> dict[str, Shape]:
    """The shapes of a pytree's leaves by their paths, as "a/b", with axes before them."""
    return {path: (*leading, *leaf.shape) for path, leaf in leaves_of(tree).items()}


def check_arrays(
    found: Any, wanted: Mapping[str, Shape], where: str, *, kind: str = "f", values: str = "finite"
) -> None:
    """Refuses a pytree that has not the leaves that are wanted, of numbers.

    Args:
      found: the pytree.
      wanted: the shapes of its leaves by their paths, see `shapes_of`. A None stands for the same number at the same
        axis of all leaves.
      where: the name of the pytree.
      kind: of their dtype, "f" for floating-point numbers, "i" for whole ones, "u" for those without a sign.
      values: what is asked of them in 32 bits: "finite"; "numbers", which may be infinite; or "any", not looked at.

    Raises:
      InputError: names the first leaf that differs.
    """
    held, free = leaves_of(found), {}
    for path in (*wanted, *held):
        name = f"{where}/{path}" if path else where
        if path not in held:
            raise InputError(f"it lacks the array {name!r}")
        if path not in wanted:
            raise InputError(f"it holds an array {name!r} that nothing reads")
        leaf, shape = held[path], wanted[path]
        filled = tuple(
            free.setdefault(axis, size) if length is None else length
            for axis, (size, length) in enumerate(zip(leaf.shape, shape, strict=False))
        )
        if filled != leaf.shape or len(shape) != len(leaf.shape) or 0 in filled:
            words = ", ".join("any" if length is None else str(length) for length in shape)
            raise InputError(f"the array {name!r} has the shape {leaf.shape}, not ({words})")
        if leaf.dtype.kind != kind:
            raise InputError(f"the array {name!r} is of {leaf.dtype}, not of {_KINDS[kind]}")
        with np.errstate(over="ignore"):
            asked = None if values == "any" else np.asarray(leaf, np.float32) if leaf.dtype.itemsize > 4 else leaf
        if asked is not None and not (~np.isnan(asked) if values == "numbers" else np.isfinite(asked)).all():
            raise InputError(f"not all values of the array {name!r} are {values}")


def to_device(arrays: Any) -> Any:
    """Puts a pytree on the device; what is too large for 32 bits, and nothing has asked of, becomes infinite."""
    with np.errstate(over="ignore"):
        return jax.device_put(arrays)


def leaves_of(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their paths, as "a/b"."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def check_facts(facts: Any, form: Any, where: str = "facts") -> None:
    """Refuses JSON values of another form.

    Args:
      facts: the values.
      form: a type; a tuple of forms, one of which it has (None stands for itself); a list of one form, which all
        values of a list have; or a dict of forms by name. None also takes what is absent, `ABSENT` that alone.
      where: the name of the values.

    Raises:
      InputError: names the first value that has not the form.
    """
    if isinstance(form, dict):
        if not isinstance(facts, dict):
            raise InputError(f"`{where}` is {_shown(facts)}, not a JSON object")
        for name, own in form.items():
            check_facts(facts.get(name, ABSENT), own, f"{where}.{name}" if where != "facts" else name)
    elif not _has(facts, form):
        raise InputError(f"`{where}` is {_shown(facts)}")


def form_of(example: Mapping[str, Any]) -> dict[str, Any]:
    """The form of the fields of a configuration, as far as a default tells it; any may be absent."""
    forms: dict[type, Any] = {bool: bool, int: int, float: (int, float), str: str}
    return {name: (forms[type(value)], ABSENT) for name, value in example.items() if type(value) in forms}


def _has(value: Any, form: Any) -> bool:
    if isinstance(form, tuple):
        return any(_has(value, one) for one in form)
    if isinstance(form, list):
        return isinstance(value, (list, tuple)) and all(_has(one, form[0]) for one in value)
    if form is None or form is ABSENT:
        return value is ABSENT or value is form
    return isinstance(value, form) and (form is bool or not isinstance(value, bool))


def _shown(value: Any) -> str:
    text = "absent" if value is ABSENT else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
