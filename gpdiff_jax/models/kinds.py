"""In: what a model says of its layers. Out: the kind of each: it works on time, the graph, the output, or on more.

The generator's `inductive_bias` conditioning tells a layer the part of the prompt that concerns it, by its kind.
"""

from collections.abc import Iterable, Sequence

from gpdiff_jax.errors import InputError

LAYER_KINDS = ("temporal", "graph", "output", "mixed")


def kinds_of_layers(kinds: Sequence[tuple[str, str]], layers: Iterable[str]) -> dict[str, str]:
    """The kind of every layer of a model.

    Args:
      kinds: pairs of the beginning of a layer's name and the kind of such layers; the longest beginning that fits
        counts. None at all leaves every layer "mixed".
      layers: names of the layers, the first keys of the parameters.

    Returns:
      The kind of each layer.

    Raises:
      InputError: an unknown kind, or a layer that none of the beginnings fits.
    """
    for beginning, kind in kinds:
        if kind not in LAYER_KINDS:
            raise InputError(f"kind {kind!r} of layer {beginning!r} must be one of {', '.join(LAYER_KINDS)}")
    if not kinds:
        return dict.fromkeys(layers, "mixed")
    found = {}
    for layer in layers:
        fitting = [(beginning, kind) for beginning, kind in kinds if layer.startswith(beginning)]
        if not fitting:
            raise InputError(f"layer {layer!r} has no kind; name one of {', '.join(LAYER_KINDS)} for it in `kinds`")
        found[layer] = max(fitting, key=lambda pair: len(pair[0]))[1]
    return found
