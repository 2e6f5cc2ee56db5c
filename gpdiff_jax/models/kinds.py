"""In: the name of a model's layer. Out: what it works on: time, the graph, the output, or more than one of them."""

import re

LAYER_KINDS = ("temporal", "graph", "output", "mixed")
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
