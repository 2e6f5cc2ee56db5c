"""In: cities and what may be seen of them. Out: prompts, the vectors that describe a region to the generator."""

from gpdiff_jax.prompts.prompt import (
    Prompts,
    PromptScaler,
    fit_prompt_scaler,
    prompts,
    region_prompts,
    scale_prompts,
    source_prompts,
)
from gpdiff_jax.prompts.statistics import spatial_statistics, temporal_statistics

__all__ = [
    "PromptScaler",
    "Prompts",
    "fit_prompt_scaler",
    "prompts",
    "region_prompts",
    "scale_prompts",
    "source_prompts",
    "spatial_statistics",
    "temporal_statistics",
]
