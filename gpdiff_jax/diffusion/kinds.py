"""In: names of a prompt's entries. Out: which of them are of space and which of time."""

import re

SPATIAL_ENTRIES = frozenset(
    ("log_degree", "log_strength", "clustering", "log_mean_hops", "share_within_two_hops", "log_spacing")
)
_SPATIAL_ENCODER = re.compile(r"spatial_\d+")


def spatial_columns(names: tuple[str, ...]) -> tuple[int, ...]:
    """Which entries of a prompt say where a region lies; the others say how it behaves.

    Args:
      names: of the entries, as `Prompts.names` has them.

    Returns:
      1 for each entry of the spatial statistics and of the spatial encoder, 0 for the others.
    """
    return tuple(int(name in SPATIAL_ENTRIES or bool(_SPATIAL_ENCODER.fullmatch(name))) for name in names)
