"""In: cities and what may be seen of them. Out: prompts, the vectors that describe a region to the generator."""

from gpdiff_jax.prompts.autoencoder import TemporalConfig
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
from gpdiff_jax.prompts.temporal import TemporalEncoder, encode, pretrain_encoder

__all__ = [
    "PromptScaler",
    "Prompts",
    "TemporalConfig",
    "TemporalEncoder",
    "encode",
    "fit_prompt_scaler",
    "pretrain_encoder",
    "prompts",
    "region_prompts",
    "scale_prompts",
    "source_prompts",
    "spatial_statistics",
    "temporal_statistics",
]
