"""In: a folder of city files. Out: settings of the smallest whole run, and its results without what a clock says."""

import dataclasses
import pathlib

from gpdiff_jax.baselines.boosted_trees import BoostedTreesConfig
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.diffusion.denoiser import DenoiserConfig
from gpdiff_jax.diffusion.training import PretrainConfig
from gpdiff_jax.hypernetwork import GenerateConfig
from gpdiff_jax.prompts.encoders import PromptConfig
from gpdiff_jax.run.settings import Settings
from gpdiff_jax.transfer.adapt_config import AdaptConfig
from gpdiff_jax.zoo.codec import CodecConfig
from gpdiff_jax.zoo.pooled import PooledConfig
from gpdiff_jax.zoo.region_training import HarvestConfig


def tiny_settings(data_dir: pathlib.Path, **change) -> Settings:
    """What `--preset tiny` stands for, cut further."""
    settings = Settings(
        data_dir=str(data_dir),
        sources=("crowd_0", "crowd_1"),
        target="crowd_2",
        interval_minutes=60,
        channels="first",
        model="tiny",
        model_file_sha256=None,
        seed=0,
        simulation=None,
        data=DataConfig(variants=5, prompt_variants=3, max_neighbours=3),
        prompts=PromptConfig(),
        pooled=PooledConfig(steps=20, regions=4, windows=4, evaluations=2),
        harvest=HarvestConfig(steps=8, windows=4, evaluate_every=4, snapshots=2, anchor_windows=0),
        pretrain=PretrainConfig(
            denoiser=DenoiserConfig(width=16, layers=1, heads=2, prompt_bottleneck=8),
            codec=CodecConfig(components=8),
            steps=4,
            batch=4,
            windows=2,
            evaluations=2,
        ),
        trees=BoostedTreesConfig(trees=4, leaves=4, windows=4),
        generate=GenerateConfig(samples=2, steps=3),
        adapt=AdaptConfig(shared_steps=3, learning_rates=(1e-3,), steps=4, evaluate_every=2, batch=16),
        target_only=AdaptConfig(update="own", learning_rates=(3e-3,), steps=4, evaluate_every=2, batch=16),
    )
    return dataclasses.replace(settings, **change)


def without_seconds(content: dict) -> dict:
    """The content of metrics.json without what a clock says."""
    methods = {
        name: {key: value for key, value in entry.items() if not key.endswith("seconds")}
        for name, entry in content["methods"].items()
    }
    return content | {"methods": methods}
