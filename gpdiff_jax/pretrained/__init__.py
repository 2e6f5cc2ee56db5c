"""In: the name of a generator that comes with the package. Out: the generator; who has none of their own begins here.

What each was made of, what it errs by in cities that it never saw, and what it is not for is in NAME.md beside it.
"""

import pathlib

from gpdiff_jax.errors import InputError
from gpdiff_jax.hypernetwork import Hypernetwork

_FOLDER = pathlib.Path(__file__).parent
DEFAULT = "crowd_hourly"


def pretrained_names() -> tuple[str, ...]:
    """Names of the generators of the package."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.md")))


def load_pretrained(name: str = DEFAULT) -> Hypernetwork:
    """Reads a generator of the package.

    Args:
      name: one of `pretrained_names`.

    Returns:
      The generator.

    Raises:
      InputError: there is none of that name.

    Example:
      >>> import gpdiff_jax as gpd
      >>> gpd.load_pretrained().kinds
      ('crowd',)
    """
    if name not in pretrained_names():
        raise InputError(f"the package has no generator {name!r}; choose from {', '.join(pretrained_names())}")
    return Hypernetwork.load(_FOLDER / name)
