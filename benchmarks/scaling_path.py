"""In: how much work there is. Out: what every stage of the path takes of it, in seconds without compiling and in GiB.

The path is that of `experiments.transfer`, with the sizes of the preset `small` and fewer steps, up to the parameters
of every region; its cities are simulated.
"""

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from benchmarks.measuring import peak_memory
from gpdiff_jax.cities import SimulationConfig, simulate_cities
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.data.sources import prepare_sources
from gpdiff_jax.models import make_model
from gpdiff_jax.pretraining import pretrain
from gpdiff_jax.prompts.sources import with_prompts
from gpdiff_jax.run.settings import Settings
from gpdiff_jax.training.parallel import training_devices
from gpdiff_jax.training.stopwatch import stopwatch
from gpdiff_jax.zoo.harvest import harvest_zoo
from gpdiff_jax.zoo.pooled import train_pooled

_MOST_OF_A_CITY = 1000  # regions
_PEAK_FILE = pathlib.Path("/proc/self/clear_refs")


class Work(NamedTuple):
    """How much there is to do."""

    regions: int = 1000
    days: int = 28
    token_width: int | None = None  # diffuse the tokens themselves, of this width; None for the codes of the preset
    batch: int = 32  # examples of a step of the generator's training
    steps: int = 16  # of every training
    stages: tuple[str, ...] = ("sources", "prompts", "pooled", "harvest", "pretrain", "generate")


class Measured(NamedTuple):
    """What a stage took."""

    stage: str
    seconds: float  # without compiling
    memory: float  # GiB, the most that the process held meanwhile
    count: int  # units of the work
    unit: str
    tokens: int | None = None  # that the generator works on, where it works on tokens


def measure_path(work: Work, tell: Callable[[Measured], None]) -> None:
    """Goes the path once.

    Args:
      work: how much; what is needed before its first stage is made, and not told.
      tell: called with every stage of the work as it ends.
    """
    preset = Settings.from_preset("small")
    num_cities = max(2, -(-work.regions // _MOST_OF_A_CITY))
    simulation = SimulationConfig(cities=num_cities, regions=work.regions // num_cities, days=work.days)
    cities = simulate_cities(simulation, seed=0)
    regions = sum(city.num_nodes for city in cities)
    readings = regions * cities[0].num_steps

    def timed(stage: str, count: int, unit: str, make: Callable[[], Any]) -> Any:
        _forget_peak()
        with stopwatch() as watch:
            made = make()
            jax.block_until_ready(jax.tree.leaves(made))
        if stage in work.stages:
            tokens = made.codec.layout.num_tokens if stage == "pretrain" and work.token_width is not None else None
            tell(Measured(stage, watch.seconds, peak_memory(), count, unit, tokens))
        return made

    sources = timed(
        "sources", readings, "readings", lambda: prepare_sources(cities, DataConfig(), key=jax.random.key(0))
    )
    prompts = len(cities) * sources.config.prompt_variants * simulation.regions
    sources = timed("prompts", prompts, "prompts", lambda: with_prompts(sources, cities))
    model = make_model("stid", sources.sizes)
    steps = work.steps
    pooled_config = dataclasses.replace(preset.pooled, steps=steps)
    pooled = timed(
        *("pooled", steps, "steps"),
        lambda: train_pooled(model, sources, pooled_config, key=jax.random.key(1)),
    )
    if not {"harvest", "pretrain", "generate"} & set(work.stages):
        return
    harvest = dataclasses.replace(preset.harvest, steps=steps, evaluate_every=steps, snapshots=1)
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder) / "zoo"
        zoo = timed(
            *("harvest", regions * steps, "region-steps"),
            lambda: harvest_zoo(model, sources, pooled, harvest, key=jax.random.key(2), folder=place),
        )
        if not {"pretrain", "generate"} & set(work.stages):
            return
        config = dataclasses.replace(preset.pretrain, steps=steps, evaluations=1, batch=work.batch)
        examples = steps * work.batch
        if work.token_width is not None:
            codec = dataclasses.replace(config.codec, token_width=work.token_width, components=0)
            config = dataclasses.replace(config, codec=codec)
        devices = training_devices(config.batch)
        generator = timed(
            *("pretrain", examples, "examples"),
            lambda: pretrain(zoo, key=jax.random.key(3), config=config, devices=devices),
        )
    if "generate" in work.stages:
        one = dataclasses.replace(preset.generate, samples=1)
        prompts_of_all = zoo.prompts.variant(0)
        timed(
            *("generate", regions, "vectors"),
            lambda: generator.generate(prompts_of_all, key=jax.random.key(4), config=one).params,
        )


def _forget_peak() -> None:
    """Lets the system count the most memory of this process anew, where it can."""
    if _PEAK_FILE.exists():
        _PEAK_FILE.write_text("5")
