"""GPDiff in JAX: generates forecasters for the regions of cities that have almost no data."""

from gpdiff_jax.analysis.diagnostics import DiagnosticsConfig
from gpdiff_jax.cities import (
    City,
    SimulationConfig,
    check_city,
    find_cities,
    load_city,
    resample,
    save_city,
    select_channels,
    simulate_cities,
)
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.diffusion.denoiser import DenoiserConfig
from gpdiff_jax.diffusion.training import PretrainConfig
from gpdiff_jax.errors import InputError
from gpdiff_jax.hypernetwork import GenerateConfig, Hypernetwork
from gpdiff_jax.models import (
    Model,
    ModelSizes,
    linen_model,
    load_model_file,
    make_model,
    model_names,
    register_model,
)
from gpdiff_jax.pretrained import load_pretrained
from gpdiff_jax.pretraining import pretrain
from gpdiff_jax.prompts.encoders import PromptConfig
from gpdiff_jax.prompts.prompt import Prompts, target_prompts
from gpdiff_jax.prompts.temporal.autoencoder import TemporalConfig
from gpdiff_jax.prompts.urban_graph.embedding_training import EmbeddingConfig
from gpdiff_jax.prompts.urban_graph.knowledge_graph import KnowledgeGraphConfig
from gpdiff_jax.region_parameters import RegionParameters
from gpdiff_jax.report import render_next, render_report
from gpdiff_jax.run.run import Run
from gpdiff_jax.run.settings import Settings
from gpdiff_jax.training.caches import clear_caches
from gpdiff_jax.training.compilation_cache import enable_compilation_cache
from gpdiff_jax.training.exchange import connect as connect_hosts
from gpdiff_jax.training.parallel import use_every_core
from gpdiff_jax.transfer.adapt_config import AdaptConfig
from gpdiff_jax.transfer.forecaster import Forecaster, forecast_next
from gpdiff_jax.transfer.forecasts import forecast
from gpdiff_jax.transfer.new_city import (
    CityParameters,
    NewCity,
    forecast_new_city,
    load_parameters,
    prepare_new_city,
    save_parameters,
)
from gpdiff_jax.transfer.next_hours import NextHours
from gpdiff_jax.zoo.codec import CodecConfig
from gpdiff_jax.zoo.harvest_cities import harvest_cities
from gpdiff_jax.zoo.parameter_zoo import ParameterZoo, load_zoo, save_zoo
from gpdiff_jax.zoo.pooled import PooledConfig
from gpdiff_jax.zoo.region_training import HarvestConfig

__all__ = [
    "AdaptConfig",
    "City",
    "CityParameters",
    "CodecConfig",
    "DataConfig",
    "DenoiserConfig",
    "DiagnosticsConfig",
    "EmbeddingConfig",
    "Forecaster",
    "GenerateConfig",
    "HarvestConfig",
    "Hypernetwork",
    "InputError",
    "KnowledgeGraphConfig",
    "Model",
    "ModelSizes",
    "NewCity",
    "NextHours",
    "ParameterZoo",
    "PooledConfig",
    "PretrainConfig",
    "PromptConfig",
    "Prompts",
    "RegionParameters",
    "Run",
    "Settings",
    "SimulationConfig",
    "TemporalConfig",
    "check_city",
    "clear_caches",
    "connect_hosts",
    "enable_compilation_cache",
    "find_cities",
    "forecast",
    "forecast_new_city",
    "forecast_next",
    "harvest_cities",
    "linen_model",
    "load_city",
    "load_model_file",
    "load_parameters",
    "load_pretrained",
    "load_zoo",
    "make_model",
    "model_names",
    "prepare_new_city",
    "pretrain",
    "register_model",
    "render_next",
    "render_report",
    "resample",
    "save_city",
    "save_parameters",
    "save_zoo",
    "select_channels",
    "simulate_cities",
    "target_prompts",
    "use_every_core",
]
