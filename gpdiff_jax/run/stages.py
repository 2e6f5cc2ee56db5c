"""In: the settings of a run, its folder and its cities. Out: its stages, each left in the folder when it is done.

A stage that the folder holds already is read, not run again; so a killed run goes on from its last finished stage.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from gpdiff_jax.baselines.autoregression import line_config, residual_autoregression
from gpdiff_jax.baselines.boosted_trees import BoostedTrees, boosted_trees
from gpdiff_jax.baselines.meta_learned import MetaConfig, meta_learn
from gpdiff_jax.baselines.mlp_hypernetwork import MlpHypernetwork, make_network, mlp_hypernetwork
from gpdiff_jax.cities import City
from gpdiff_jax.data.sources import Sources, prepare_sources
from gpdiff_jax.data.target import Target, prepare_targets
from gpdiff_jax.errors import InputError
from gpdiff_jax.files import read_json, write_json
from gpdiff_jax.hosts import is_first
from gpdiff_jax.hypernetwork import Hypernetwork
from gpdiff_jax.models import Model, make_model
from gpdiff_jax.pretraining import LatentSpace, fit_latent_space, pretrain
from gpdiff_jax.prompts.encoders import PromptEncoder, plain_encoder
from gpdiff_jax.prompts.prompt import Prompts, region_prompts
from gpdiff_jax.prompts.sources import PromptedSources, attach_prompts, fit_encoder, with_prompts
from gpdiff_jax.run.provenance import check_stage, note_stage
from gpdiff_jax.run.settings import Settings
from gpdiff_jax.training.checkpoints import checkpoints_beside, checkpoints_of, drop_checkpoints
from gpdiff_jax.training.digest import digest_of
from gpdiff_jax.training.exchange import ask_first
from gpdiff_jax.training.progress import LogWriter, stage
from gpdiff_jax.training.stopwatch import stopwatch
from gpdiff_jax.training.storage import load_arrays, save_arrays
from gpdiff_jax.training.stored_form import building
from gpdiff_jax.typing import Key, Params
from gpdiff_jax.zoo.directions import zoo_directions
from gpdiff_jax.zoo.harvest import harvest_zoo
from gpdiff_jax.zoo.parameter_zoo import ParameterZoo, load_zoo
from gpdiff_jax.zoo.pooled import PooledConfig, train_pooled

_FORMAT = 3
_MOST_NAMED = 5


@dataclasses.dataclass
class Stages:
    """A run's settings, folder and cities; what its stages make is read or made when first asked for."""

    settings: Settings
    folder: pathlib.Path
    source_cities: list[City]
    target_cities: list[City]  # one per channel
    # By channel, family of methods, and whether they are of the choice: starts of the target's regions and seconds.
    starts: dict[tuple[int, str, bool], tuple[Params, float]] = dataclasses.field(default_factory=dict)

    def key(self, name: str) -> Key:
        """The random key of a stage."""
        return jax.random.fold_in(jax.random.key(self.settings.seed), zlib.crc32(name.encode()))

    @functools.cached_property
    def identity(self) -> str:
        """By what the first host knows the run: a digest of the settings and cities that config.json holds."""
        path = self.folder / "config.json"
        held = read_json(path) if is_first() and path.exists() else {}
        return digest_of(json.dumps([held.get("settings"), held.get("cities")], sort_keys=True), {})

    def checkpoints(self, name: str) -> pathlib.Path:
        """Where a stage keeps the checkpoints of a training that is not finished."""
        return checkpoints_of(self.folder, name)

    def has(self, name: str) -> bool:
        """Whether a stage is finished and written, as the first host sees it."""
        return ask_first((self.folder / name).is_dir)

    def keep(self, name: str, arrays: dict, facts: dict[str, Any] | None = None) -> None:
        """Writes what a stage made, and removes the checkpoints of its training."""
        save_arrays(self.folder / name, arrays, {"format": _FORMAT, **(facts or {})})
        note_stage(self.folder, name)
        drop_checkpoints(self.checkpoints(name))

    def read(self, name: str, what: str) -> tuple[dict, dict]:
        """Reads what `keep` wrote: arrays and facts; and removes the checkpoints, if a kill came before that.

        Raises:
          InputError: it is damaged, or another run's.
        """
        check_stage(self.folder, name)
        held = load_arrays(self.folder / name, _FORMAT, what)
        drop_checkpoints(self.checkpoints(name))
        return held

    @functools.cached_property
    def sources(self) -> Sources:
        """The source regions on the device."""
        return prepare_sources(self.source_cities, self.settings.data, key=self.key("sources"), seed=self.settings.seed)

    @functools.cached_property
    def prompt_encoder(self) -> PromptEncoder:
        """What makes the prompts of the settings."""
        return _encoder_stage(self)

    @functools.cached_property
    def prompted(self) -> PromptedSources:
        """The source regions with the prompts of the settings."""
        return _prompts_stage(self)

    @functools.cached_property
    def target_prompts(self) -> list[Prompts]:
        """Prompts of the target's regions, one value per channel."""
        pairs = zip(self.target_cities, self.targets, strict=True)
        return [region_prompts(city, [target.split.support], self.prompt_encoder) for city, target in pairs]

    @functools.cached_property
    def choice_prompts(self) -> list[Prompts | None]:
        """Prompts of the target's regions from its adaptation days alone; None where nothing can be chosen."""
        pairs = zip(self.target_cities, self.targets, strict=True)
        return [
            region_prompts(city, [target.split.adaptation], self.prompt_encoder) if target.can_choose else None
            for city, target in pairs
        ]

    @functools.cached_property
    def targets(self) -> list[Target]:
        """The target's regions on the device, one value per channel."""
        return prepare_targets(self.target_cities, self.settings.data, seed=self.settings.seed)

    @functools.cached_property
    def model(self) -> Model:
        """The forecaster."""
        return make_model(self.settings.model, self.sources.sizes)

    @functools.cached_property
    def pooled(self) -> Params:
        """The pooled model."""
        return _pooled_stage(self, "pooled", self.model, self.settings.pooled)

    @functools.cached_property
    def meta_learned(self) -> Params:
        """The meta-learned model."""
        return _meta_stage(self)

    @functools.cached_property
    def autoregression(self) -> Params:
        """The linear autoregression, fitted on all source regions."""
        line, config = residual_autoregression(self.sources.sizes), line_config(self.settings.pooled)
        return _pooled_stage(self, "residual_autoregression", line, config)

    @functools.cached_property
    def trees(self) -> BoostedTrees:
        """The boosted trees, fitted on all source regions."""
        return _trees_stage(self)

    @functools.cached_property
    def zoo(self) -> ParameterZoo:
        """The harvested regions."""
        return _harvest_stage(self)

    @functools.cached_property
    def directions(self) -> Params:
        """The directions along which methods are fine-tuned in codes."""
        return zoo_directions(self.zoo, self.settings.adapt.directions)

    @functools.cached_property
    def hypernetwork(self) -> Hypernetwork:
        """The trained generator."""
        return _pretrain_stage(self)

    @functools.cached_property
    def latent_space(self) -> LatentSpace:
        """What the generator and the MLP work in."""
        return fit_latent_space(self.zoo, self.settings.pretrain, key=self.key("pretrain"))

    @functools.cached_property
    def mlp(self) -> MlpHypernetwork:
        """The deterministic network that stands beside the generator."""
        return _mlp_stage(self, 0)

    @functools.cached_property
    def mlp_ensemble(self) -> list[MlpHypernetwork]:
        """As many such networks as the generator draws samples, from other seeds; the first is `mlp`."""
        return [self.mlp, *(_mlp_stage(self, member) for member in range(1, self.settings.generate.samples))]

    @functools.cached_property
    def generated(self) -> "Generated":
        """Parameters generated from the prompts of the support days."""
        return _generate_stage(self, "generated", dict(enumerate(self.target_prompts)))

    @functools.cached_property
    def generated_for_choice(self) -> "Generated":
        """Parameters generated from the prompts of the adaptation days, with the same noise."""
        held = {channel: prompts for channel, prompts in enumerate(self.choice_prompts) if prompts is not None}
        return _generate_stage(self, "generated_for_choice", held)

    @property
    def seconds(self) -> dict[str, float]:
        """How long every stage worked, by name, over all processes that worked on it; without compiling."""
        return read_seconds(self.folder / "seconds.json")


def read_seconds(path: pathlib.Path) -> dict[str, float]:
    """How long stages took, by name; a file that does not say so is named on standard error and counts for nothing."""
    if not path.exists():
        return {}
    held = None
    with contextlib.suppress(InputError, IsADirectoryError):
        held = read_json(path)
    if isinstance(held, dict) and all(isinstance(one, (int, float)) for one in held.values()):
        return held
    print(f"{path} does not say how long stages took; those before now count for nothing", file=sys.stderr)
    return {}


class Generated(NamedTuple):
    """Generated parameters of a target, by the number of the channel."""

    params: dict[int, Params]  # leaves [K, R, ...]
    seconds: dict[int, float]  # that generating them took


@contextlib.contextmanager
def _logged(run: Stages, name: str, total: int) -> Iterator[Callable[[int, dict[str, Any]], None]]:
    """Progress on the terminal, lines in log.jsonl, seconds in seconds.json; yields `report(done, metrics)`."""
    before = run.seconds
    with LogWriter(run.folder / "log.jsonl") as log, stage(name, total) as shown, stopwatch() as watch:

        def count() -> None:
            # As it goes, so that a process that is killed leaves what it took.
            seconds = before | {name: before.get(name, 0.0) + watch.seconds}
            write_json(run.folder / "seconds.json", seconds)

        def report(done: int, metrics: dict[str, Any]) -> None:
            log.write(name, done, **metrics)
            shown.advance(done - shown.completed, **metrics)
            count()

        try:
            yield report
        finally:
            count()


def _encoder_stage(run: Stages) -> PromptEncoder:
    config = run.settings.prompts
    if not config.needs_training:
        return plain_encoder()
    if run.has("prompt_encoder"):
        held = run.read("prompt_encoder", "prompt encoder")
        with building("prompt encoder", run.folder / "prompt_encoder"):
            return PromptEncoder.from_arrays(*held)
    with _logged(run, "prompt_encoder", config.temporal.steps if "temporal" in config.parts else 1) as report:
        kept: Any = {"checkpoints": run.checkpoints("prompt_encoder"), "progress": report}
        encoder = fit_encoder(run.sources, run.source_cities, config, key=run.key("prompts"), **kept)
        if "temporal" not in config.parts:
            report(1, {})
    run.keep("prompt_encoder", encoder.arrays(), encoder.facts())
    return encoder


def _prompts_stage(run: Stages) -> PromptedSources:
    if not run.settings.prompts.needs_training:
        return with_prompts(run.sources, run.source_cities)
    if run.has("prompts"):
        arrays, facts = run.read("prompts", "prompts of the sources")
        named = tuple(facts["names"]), tuple(facts["provenance"])
        values, region_ids = jax.device_put((arrays["values"], arrays["region_ids"]))
        prompts = Prompts(values, region_ids, *named, spatial=tuple(facts["spatial"]))
        return attach_prompts(run.sources, prompts, run.prompt_encoder)
    encoder = run.prompt_encoder
    with _logged(run, "prompts", len(run.source_cities)) as report:
        sources = with_prompts(run.sources, run.source_cities, encoder, progress=report)
    made = sources.prompts
    named = {"names": made.names, "provenance": made.provenance, "spatial": made.spatial}
    run.keep("prompts", {"values": made.values, "region_ids": made.region_ids}, named)
    return sources


def _pooled_stage(run: Stages, name: str, model: Model, config: PooledConfig) -> Params:
    """A model trained on all source regions together."""
    if run.has(name):
        return jax.device_put(run.read(name, name)[0])
    with _logged(run, name, config.steps) as report:
        kept: Any = {"checkpoints": run.checkpoints(name), "progress": report}
        pooled = train_pooled(model, run.sources, config, key=run.key(name), **kept)
    run.keep(name, pooled)
    return pooled


def _meta_stage(run: Stages) -> Params:
    config, pooled = MetaConfig.beside(run.settings.pooled), run.pooled
    if run.has("meta_learned"):
        return jax.device_put(run.read("meta_learned", "meta-learned model")[0])
    with _logged(run, "meta_learned", config.steps) as report:
        kept: Any = {"checkpoints": run.checkpoints("meta_learned"), "progress": report}
        params = meta_learn(run.model, run.sources, pooled, config, key=run.key("meta_learned"), **kept)
    run.keep("meta_learned", params)
    return params


def _trees_stage(run: Stages) -> BoostedTrees:
    sizes = run.sources.sizes
    if run.has("boosted_trees"):
        return BoostedTrees.from_arrays(run.read("boosted_trees", "boosted trees")[0], sizes)
    with _logged(run, "boosted_trees", sizes.horizon) as report:
        trees = boosted_trees(run.sources, run.settings.trees, key=run.key("boosted_trees"), progress=report)
    run.keep("boosted_trees", trees.arrays())
    return trees


def _harvest_stage(run: Stages) -> ParameterZoo:
    folder = run.folder / "zoo"
    if run.has("zoo"):
        check_stage(run.folder, "zoo")
        return load_zoo(folder, run.prompted)
    pooled, sources = run.pooled, run.prompted
    alone = sources.unvalidated
    if alone:
        shown = ", ".join(map(repr, alone[:_MOST_NAMED])) + (", ..." if len(alone) > _MOST_NAMED else "")
        print(
            f"{len(alone)} source regions have no reading in their validation windows ({shown}); they take all steps "
            "and no part in the validation error",
            file=sys.stderr,
        )
    with _logged(run, "harvest", sources.num_regions) as report:
        config, key = run.settings.harvest, run.key("harvest")
        zoo = harvest_zoo(run.model, sources, pooled, config, key=key, folder=folder, progress=report)
    note_stage(run.folder, "zoo")
    return zoo


def _pretrain_stage(run: Stages) -> Hypernetwork:
    folder = run.folder / "hypernetwork"
    if run.has("hypernetwork"):
        check_stage(run.folder, "hypernetwork")
        held = Hypernetwork.load(folder)
        drop_checkpoints(checkpoints_beside(folder))
        return held
    zoo, config = run.zoo, run.settings.pretrain
    with _logged(run, "pretrain", config.steps) as report:
        made = pretrain(zoo, key=run.key("pretrain"), config=config, folder=folder, progress=report)
    note_stage(run.folder, "hypernetwork")
    return made


def _mlp_stage(run: Stages, member: int) -> MlpHypernetwork:
    """One network of the ensemble; all but the first count as the ensemble's work."""
    name = "mlp_hypernetwork" if member == 0 else f"mlp_hypernetwork_{member}"
    config, zoo = run.settings.pretrain, run.zoo
    if run.has(name):
        variables = jax.device_put(run.read(name, "MLP hypernetwork")[0])
        return MlpHypernetwork(make_network(run.latent_space, config), variables, run.latent_space)
    with _logged(run, "mlp" if member == 0 else "mlp_ensemble", config.steps) as report:
        key = run.key(name)
        kept: Any = {"checkpoints": run.checkpoints(name), "progress": report}
        mlp = mlp_hypernetwork(zoo, run.latent_space, config, key=key, **kept)
    run.keep(name, mlp.variables)
    return mlp


def generate_key(run: Stages, channel: int) -> Key:
    """The key that a channel's parameters are drawn with."""
    return jax.random.fold_in(run.key("generate"), channel + 1)


def _generate_stage(run: Stages, name: str, prompts: dict[int, Prompts]) -> Generated:
    if run.has(name):
        arrays, facts = run.read(name, "generated parameters")
        params = {int(channel): leaves for channel, leaves in jax.device_put(arrays["channels"]).items()}
        return Generated(params, {int(channel): seconds for channel, seconds in facts["seconds"].items()})
    hypernetwork, config = run.hypernetwork, run.settings.generate
    made = Generated({}, {})
    with _logged(run, "generate", len(prompts)) as report:
        for done, (channel, of_channel) in enumerate(prompts.items(), start=1):
            key = generate_key(run, channel)
            with stopwatch() as watch:
                drawn = hypernetwork.generate(of_channel, key=key, config=config, any_kind=True)
            made.params[channel], made.seconds[channel] = drawn.params, watch.seconds
            report(done, {"samples": config.samples})
    arrays = {"channels": {str(channel): params for channel, params in made.params.items()}}
    run.keep(name, arrays, {"seconds": made.seconds})
    return made
