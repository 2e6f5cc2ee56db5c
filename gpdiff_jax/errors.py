"""In: what a user got wrong.
Out: exceptions whose message is one clear line, naming the thing, its value and the remedy.
"""

from collections.abc import Mapping
from typing import Any


class InputError(ValueError):
    """Report a mistake that a user can mend: a file, a flag or an argument."""


class NotFiniteError(InputError, FloatingPointError):
    """Report a training that left the numbers: its learning rate is a user's to lower."""


def named(config: object, *names: str) -> dict[str, Any]:
    """The values of some fields of a configuration, by their names, for the checks below."""
    return {name: getattr(config, name) for name in names}


def check_at_least(least: int, values: Mapping[str, Any]) -> None:
    """Raises `InputError` where a value is below the least, or no number; None passes, for what is chosen later."""
    for name, value in values.items():
        if value is not None and not value >= least:
            raise InputError(f"`{name}` must be at least {least}, got {value}")


def check_above_zero(values: Mapping[str, Any]) -> None:
    """Raises `InputError` where a value is not above 0, or no number."""
    for name, value in values.items():
        if not value > 0:
            raise InputError(f"`{name}` must be above 0, got {value}")
