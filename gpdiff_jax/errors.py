"""In: what a user got wrong.
Out: exceptions whose message is one clear line, naming the thing, its value and the remedy.
"""

import dataclasses
import errno
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

_LONGEST = 1800
_LONG_WORD = re.compile(r"[^\s/]{200,}")


class InputError(ValueError):
    """Report a mistake that a user can mend: a file, a flag or an argument.

    A value that a file fills with thousands of characters, or with lines, is cut in the message, which stays a line.
    """

    def __init__(self, message: object = "") -> None:
        text = _LONG_WORD.sub(_cut, " ".join(str(message).splitlines()))
        if len(text) > _LONGEST:
            text = f"{text[: _LONGEST // 2]}...{text[-_LONGEST // 4 :]} ({len(text)} characters)"
        super().__init__(text)


def _cut(word: re.Match[str]) -> str:
    return f"{word[0][:60]}...{word[0][-20:]} ({len(word[0])} characters)"


class NotFiniteError(InputError, FloatingPointError):
    """Report a training that left the numbers: its learning rate is a user's to lower."""


def check_types(config: Any) -> None:
    """Brings the numbers of a dataclass to Python's own; raises `InputError` where a field holds something else."""
    for field in dataclasses.fields(config):
        if typing.get_origin(field.type) is tuple and typing.get_args(field.type) == (float, ...):
            object.__setattr__(config, field.name, _numbers(field.name, getattr(config, field.name)))
        kinds = set(typing.get_args(field.type)) if isinstance(field.type, types.UnionType) else {field.type}
        if not kinds <= {int, float, types.NoneType}:
            continue
        value = getattr(config, field.name)
        if getattr(value, "shape", None) == () and hasattr(value, "item"):  # a scalar of NumPy or JAX
            value = value.item()
            object.__setattr__(config, field.name, value)
        right: Any = tuple(kinds | ({int} if float in kinds else set()))  # whole numbers are numbers
        if isinstance(value, bool) or not isinstance(value, right):
            wanted, found = "a number" if float in kinds else "an int", type(value).__name__
            raise InputError(f"`{field.name}` (={value!r}, of type {found}) must be {wanted}; convert it")


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    """Several numbers as Python's own."""
    plain = values.tolist() if getattr(values, "ndim", 0) == 1 and hasattr(values, "tolist") else values
    if isinstance(plain, (list, tuple)):
        each = [one.item() if getattr(one, "shape", None) == () and hasattr(one, "item") else one for one in plain]
        if all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in each):
            return tuple(map(float, each))
    raise InputError(f"`{name}` (={values!r}) must be several numbers, as (0.1,) or (0.03, 0.1)")


def named(config: Any, *names: str) -> dict[str, Any]:
    """The values of some fields of a configuration, or of all, by name, for the checks below; see `check_types`."""
    check_types(config)
    return {name: getattr(config, name) for name in names or (field.name for field in dataclasses.fields(config))}


def check_at_least(least: int, values: Mapping[str, Any]) -> None:
    """Raises `InputError` where a value is below the least, or no number; None passes, for what is chosen later."""
    for name, value in values.items():
        if value is not None and not value >= least:
            raise InputError(f"`{name}` must be at least {least}, got {value}")


def check_above_zero(values: Mapping[str, Any]) -> None:
    """Raises `InputError` where a value is not above 0, or not finite; None passes, for what is chosen later."""
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"`{name}` must be {'above 0' if value != math.inf else 'finite'}, got {value}")


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception says that the disk is full, also where a writer wraps the system's message in its own."""
    return os.strerror(errno.ENOSPC).lower() in str(error).lower()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the host or on a device, whose exceptions only words tell."""
    text = str(error)
    return isinstance(error, MemoryError) or ("RESOURCE_EXHAUSTED" in text and "memory" in text.lower())
