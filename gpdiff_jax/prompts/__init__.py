"""In: cities and what may be seen of them. Out: prompts, the vectors that describe a region to the generator."""

from gpdiff_jax.prompts.encoders import PromptConfig, PromptEncoder, fit_prompt_encoder
from gpdiff_jax.prompts.prompt import (
    Prompts,
    PromptScaler,
    fit_prompt_scaler,
    region_prompts,
    scale_prompts,
    source_prompts,
    target_prompts,
)
from gpdiff_jax.prompts.statistics import spatial_statistics, temporal_statistics
from gpdiff_jax.prompts.temporal.autoencoder import TemporalConfig
from gpdiff_jax.prompts.temporal.encoder import TemporalEncoder, encode, pretrain_encoder
from gpdiff_jax.prompts.urban_graph.embedding import Embedding, evaluate_embedding, fold_in, train_embedding
from gpdiff_jax.prompts.urban_graph.embedding_training import EmbeddingConfig
from gpdiff_jax.prompts.urban_graph.knowledge_graph import (
    KnowledgeGraph,
    KnowledgeGraphConfig,
    add_triples,
    build_knowledge_graph,
    join_graphs,
)
from gpdiff_jax.prompts.urban_graph.triples import read_triples, split_triples, write_triples

__all__ = [
    "Embedding",
    "EmbeddingConfig",
    "KnowledgeGraph",
    "KnowledgeGraphConfig",
    "PromptConfig",
    "PromptEncoder",
    "PromptScaler",
    "Prompts",
    "TemporalConfig",
    "TemporalEncoder",
    "add_triples",
    "build_knowledge_graph",
    "encode",
    "evaluate_embedding",
    "fit_prompt_encoder",
    "fit_prompt_scaler",
    "fold_in",
    "join_graphs",
    "pretrain_encoder",
    "read_triples",
    "region_prompts",
    "scale_prompts",
    "source_prompts",
    "spatial_statistics",
    "split_triples",
    "target_prompts",
    "temporal_statistics",
    "train_embedding",
    "write_triples",
]
