"""In: names of a model's layers and of a prompt's entries. Out: which of them are of space and which of time."""

import re

SPATIAL_ENTRIES = frozenset(
    ("log_degree", "log_strength", "clustering", "log_mean_hops", "share_within_two_hops", "log_spacing")
)
_SPATIAL_ENCODER = re.compile(r"spatial_\d+")
_GRAPH_WORDS = frozenset(("graph", "adaptive", "adjacency", "spatial", "diffusion"))
_OUTPUT_WORDS = frozenset(("head", "output", "readout", "skip"))
_TEMPORAL_WORDS = frozenset(("gate", "temporal", "time", "input", "embedding", "encoder", "covariates", "history"))


def layer_kind(name: str) -> str:
    """What a layer works on, as far as its name tells.

    A word of the graph anywhere in the name decides, then one of the output, then one of time. The recurrent cell of
    DCRNN mixes time and graph in every weight, and says neither.

    Args:
      name: of a layer, the first key on the path of its parameters.

    Returns:
      "graph", "output", "temporal", or "mixed" where the name does not tell.
    """
    words = set(re.split(r"[^a-z]+", name.lower()))
    if "cell" in words:
        return "mixed"
    for kind, known in (("graph", _GRAPH_WORDS), ("output", _OUTPUT_WORDS), ("temporal", _TEMPORAL_WORDS)):
        if words & known:
            return kind
    return "mixed"


def spatial_columns(names: tuple[str, ...]) -> tuple[int, ...]:
    """Which entries of a prompt say where a region lies; the others say how it behaves.

    Args:
      names: of the entries, as `Prompts.names` has them.

    Returns:
      1 for each entry of the spatial statistics and of the spatial encoder, 0 for the others.
    """
    return tuple(int(name in SPATIAL_ENTRIES or bool(_SPATIAL_ENCODER.fullmatch(name))) for name in names)
