"""In: source cities. Out: the parameter zoo, by all stages before the generator: prompts, pooled model, harvest."""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from gpdiff_jax.cities.city import City
from gpdiff_jax.cities.digest import city_digest
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.data.sources import Sources, prepare_sources
from gpdiff_jax.errors import InputError
from gpdiff_jax.files import user_path
from gpdiff_jax.folder_lock import locked_folder
from gpdiff_jax.hosts import is_first
from gpdiff_jax.models.protocol import Model, abstract_params, model_text
from gpdiff_jax.models.registry import make_model
from gpdiff_jax.prompts.encoders import PromptConfig, PromptEncoder, check_parts
from gpdiff_jax.prompts.sources import fit_encoder, with_prompts
from gpdiff_jax.training.checkpoints import checkpoints_of, drop_checkpoints
from gpdiff_jax.training.digest import digest_of
from gpdiff_jax.training.exchange import ask_first
from gpdiff_jax.training.storage import load_arrays, save_arrays
from gpdiff_jax.training.stored_form import building
from gpdiff_jax.typing import Device, Key, Params
from gpdiff_jax.zoo.harvest import harvest_zoo
from gpdiff_jax.zoo.parameter_zoo import ParameterZoo
from gpdiff_jax.zoo.pooled import PooledConfig, train_pooled
from gpdiff_jax.zoo.region_training import HarvestConfig

_FORMAT = 3

Progress = Callable[[str, int, dict[str, float]], None]
"""Called with the name of a stage, how much of it is done (steps, or regions), and its metrics."""


def harvest_cities(
    cities: Sequence[City],
    *,
    model: str = "stid",
    key: Key,
    data: DataConfig = DataConfig(),
    pooled: PooledConfig = PooledConfig(),
    config: HarvestConfig = HarvestConfig(),
    prompts: PromptConfig = PromptConfig(),
    folder: str | pathlib.Path | None = None,
    devices: Sequence[Device] | None = None,
    progress: Progress | None = None,
) -> ParameterZoo:
    """Trains the pooled model, then every region's own parameters from it.

    Args:
      cities: one-channel source cities of one interval.
      model: name of a registered model.
      key: random key.
      data: windows, covariates and graphs.
      pooled: training of the pooled model.
      config: training of the regions.
      prompts: parts of the prompts; with others than statistics, their encoders are trained on the cities too.
      folder: where everything is kept as it comes: a harvest that was stopped goes on where it was, and a finished one
        is read. None keeps all in memory.
      devices: to spread the work over; None for all that suit each stage.
      progress: see `Progress`; its stages are "prompt_encoder", "pooled" and "harvest".

    Returns:
      The zoo, with the sources attached for `pretrain`.

    Raises:
      InputError: see `prepare_sources`, `check_parts`, `make_model` and `harvest_chunks`; or the folder holds a harvest
        of other cities, settings, model or key, or another process works in it.
      NotFiniteError: a loss is not finite.

    Example:
      >>> import jax, gpdiff_jax as gpd
      >>> cities = [gpd.load_city(path) for path in paths]  # doctest: +SKIP
      >>> zoo = gpd.harvest_cities(cities, key=jax.random.key(0), folder="zoo")  # doctest: +SKIP
    """
    data_key, pooled_key, region_key = jax.random.split(key, 3)
    keys = (jax.random.fold_in(data_key, 1), pooled_key, region_key)
    sources = prepare_sources(cities, data, key=data_key)
    for city, spans in zip(cities, sources.spans, strict=True):
        check_parts(prompts, city, spans[0])
    forecaster = make_model(model, sources.sizes)
    place = None if folder is None else user_path(folder).absolute()
    if place is not None and is_first():
        place.mkdir(parents=True, exist_ok=True)
    with locked_folder(place):
        return _harvest_in(
            place, cities, sources, forecaster, pooled, config, prompts, keys, devices=devices, progress=progress
        )


def _harvest_in(
    place: pathlib.Path | None,
    cities: Sequence[City],
    sources: Sources,
    forecaster: Model,
    pooled: PooledConfig,
    config: HarvestConfig,
    prompts: PromptConfig,
    keys: tuple[Key, Key, Key],
    *,
    devices: Sequence[Device] | None,
    progress: Progress | None,
) -> ParameterZoo:
    """The stages of `harvest_cities`, each kept in the folder `place`, if there is one."""
    encoder_key, pooled_key, region_key = keys

    def reports(stage: str) -> Callable[[int, dict[str, float]], None] | None:
        return None if progress is None else functools.partial(progress, stage)

    def stored(
        stage: str, settings: tuple, own_key: Key, make: Callable[[pathlib.Path | None], tuple[dict, dict]]
    ) -> tuple[dict, dict]:
        """What a stage made before, or makes now: arrays and facts."""
        if place is None:
            return make(None)
        text = model_text(forecaster, sources.sizes, abstract_params(forecaster, sources.sizes))
        words = (settings, text, sources.names, sources.config, [city_digest(city) for city in cities])
        of = digest_of(repr(words), (own_key, sources))
        checkpoints = checkpoints_of(place, stage)
        if not ask_first((place / stage).is_dir):
            arrays, facts = make(checkpoints)
            save_arrays(place / stage, arrays, {"format": _FORMAT, "of": of, **facts})
            drop_checkpoints(checkpoints)
            return arrays, facts
        arrays, facts = load_arrays(place / stage, _FORMAT, stage.replace("_", " "))
        if facts.get("of") != of:
            raise InputError(
                f"{str(place)!r} holds a harvest of other cities, settings, model, random key or version of JAX; name "
                "another folder"
            )
        drop_checkpoints(checkpoints)
        return arrays, facts

    encoder = None
    if prompts.needs_training:

        def make_encoder(checkpoints: pathlib.Path | None) -> tuple[dict, dict]:
            kept: Any = {"checkpoints": checkpoints, "progress": reports("prompt_encoder")}
            made = fit_encoder(sources, cities, prompts, key=encoder_key, **kept)
            return made.arrays(), made.facts()

        held = stored("prompt_encoder", (prompts,), encoder_key, make_encoder)
        with building("prompt encoder", "memory" if place is None else place / "prompt_encoder"):
            encoder = PromptEncoder.from_arrays(*held)

    def make_pooled(checkpoints: pathlib.Path | None) -> tuple[dict, dict]:
        kept: Any = {"checkpoints": checkpoints, "progress": reports("pooled")}
        return train_pooled(forecaster, sources, pooled, key=pooled_key, devices=devices, **kept), {}

    trained_so = pooled.with_covariates(sources.config.covariates)
    start: Params = jax.device_put(stored("pooled", (forecaster.name, trained_so), pooled_key, make_pooled)[0])
    prompted = with_prompts(sources, cities, encoder)
    place = None if place is None else place / "zoo"
    kept: Any = {"folder": place, "devices": devices, "progress": reports("harvest")}
    return harvest_zoo(forecaster, prompted, start, config, key=region_key, **kept)
