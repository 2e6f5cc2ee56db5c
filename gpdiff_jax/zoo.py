"""In: harvested parameters of all source regions, and their prompts. Out: the parameter zoo, on disk and back.

The zoo is the training set of the generator: a few parameter vectors per region, with where each came from.
"""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np

from gpdiff_jax.checkpoint import load_arrays, save_arrays
from gpdiff_jax.prompts.prompt import Prompts
from gpdiff_jax.sources import Sources
from gpdiff_jax.typing import Params

_FORMAT = 1


@dataclasses.dataclass(frozen=True, eq=False)
class ParameterZoo:
    """S parameter vectors for each of R source regions, grown from one base."""

    model: str
    base: Params
    params: Params  # leaves float32 [R, S, ...]
    validation_mae: np.ndarray  # float32 [R, S], scaled
    start_mae: np.ndarray  # float32 [R], of where each region started
    step: np.ndarray  # int32 [R, S], training steps behind each vector
    prompts: Prompts  # values [V, R, E]
    names: tuple[str, ...]  # R, "city/node"
    city_index: np.ndarray  # int32 [R]
    sources: Sources | None = None  # what it was harvested from; not saved

    @property
    def num_regions(self) -> int:
        """R."""
        return len(self.names)


def save_zoo(folder: pathlib.Path, zoo: ParameterZoo) -> None:
    """Writes a zoo with orbax; whole or not at all.

    Args:
      folder: a folder that does not exist yet.
      zoo: what to write.
    """
    arrays = {
        "base": zoo.base,
        "params": zoo.params,
        "validation_mae": zoo.validation_mae,
        "start_mae": zoo.start_mae,
        "step": zoo.step,
        "prompts": zoo.prompts.values,
        "region_ids": zoo.prompts.region_ids,
        "city_index": zoo.city_index,
    }
    facts = {"format": _FORMAT, "model": zoo.model, "names": zoo.names, "prompt_names": zoo.prompts.names}
    save_arrays(folder, arrays, facts)


def load_zoo(folder: pathlib.Path, sources: Sources | None = None) -> ParameterZoo:
    """Reads a zoo back, and attaches the sources that it was harvested from.

    Raises:
      InputError: there is none, or it is damaged or of another format.
    """
    arrays, facts = load_arrays(folder, _FORMAT, "zoo")
    return ParameterZoo(
        model=facts["model"],
        base=arrays["base"],
        params=arrays["params"],
        validation_mae=np.asarray(arrays["validation_mae"]),
        start_mae=np.asarray(arrays["start_mae"]),
        step=np.asarray(arrays["step"]),
        prompts=Prompts(
            jnp.asarray(arrays["prompts"]), jnp.asarray(arrays["region_ids"]), tuple(facts["prompt_names"])
        ),
        names=tuple(facts["names"]),
        city_index=np.asarray(arrays["city_index"]),
        sources=sources,
    )
