"""In: source regions and what makes prompts. Out: the regions with their prompts, which a generator is trained on."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct

from gpdiff_jax.cities.city import City
from gpdiff_jax.data.sources import Sources
from gpdiff_jax.prompts.encoders import PromptConfig, PromptEncoder, fit_prompt_encoder
from gpdiff_jax.prompts.prompt import Prompts, source_prompts
from gpdiff_jax.typing import Key


@flax.struct.dataclass
class PromptedSources(Sources):
    """R source regions with the prompts of the first of their variants."""

    prompts: Prompts  # [V, R, E]
    prompt_encoder: PromptEncoder | None = None  # what made the prompts; None for statistics alone


def fit_encoder(
    sources: Sources,
    cities: Sequence[City],
    config: PromptConfig,
    *,
    key: Key,
    checkpoints: pathlib.Path | None = None,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> PromptEncoder:
    """Trains what makes prompts on source cities: their training spans, and one window of each for its graph.

    Args:
      sources: of `prepare_sources`.
      cities: the cities they were prepared from.
      config: parts of the prompt and sizes of their encoders.
      key: random key.
      checkpoints: folder from which a training that was stopped goes on; see `loop.train`.
      progress: see `fit_prompt_encoder`.

    Returns:
      The encoder.

    Raises:
      InputError: see `fit_prompt_encoder`.
      NotFiniteError: a loss is not finite.
    """
    windows = [spans[0] for spans in sources.spans]
    kept: Any = {"checkpoints": checkpoints, "progress": progress}
    return fit_prompt_encoder(cities, sources.train_spans, windows, config, key=key, **kept)


def with_prompts(
    sources: Sources,
    cities: Sequence[City],
    encoder: PromptEncoder | None = None,
    *,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> PromptedSources:
    """Makes the prompts of source regions.

    Args:
      sources: of `prepare_sources`.
      cities: the cities they were prepared from.
      encoder: of `fit_encoder`; None for statistics alone.
      progress: see `source_prompts`.

    Returns:
      The sources with their prompts, and the encoder that made them.

    Raises:
      InputError: see `source_prompts`.
    """
    prompts = source_prompts(cities, sources.prompted_spans, sources.train_spans, encoder, progress)
    return attach_prompts(sources, prompts, encoder)


def attach_prompts(sources: Sources, prompts: Prompts, encoder: PromptEncoder | None = None) -> PromptedSources:
    """Puts prompts that were made before beside their regions."""
    own = {field.name: getattr(sources, field.name) for field in dataclasses.fields(Sources)}
    return PromptedSources(**own, prompts=prompts, prompt_encoder=encoder)
