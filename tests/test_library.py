"""In: simulated cities. Out: forecasts by the five lines that a user of the library writes."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

import gpdiff_jax as gpd
from gpdiff_jax.models import registry
from gpdiff_jax.zoo.codec import CodecConfig

_DATA = gpd.DataConfig(covariates="none", variants=3, max_neighbours=3)
_POOLED = gpd.PooledConfig(steps=30, regions=8, windows=4, evaluations=2)
_HARVEST = gpd.HarvestConfig(steps=10, windows=4, evaluate_every=5, snapshots=2)
_PRETRAIN = gpd.PretrainConfig(
    denoiser=gpd.DenoiserConfig(width=16, layers=1, heads=2, prompt_bottleneck=8),
    codec=CodecConfig(components=8),
    steps=6,
    batch=4,
    windows=2,
    evaluations=2,
)
_GENERATE = gpd.GenerateConfig(samples=2, steps=3)


@pytest.fixture(scope="module", name="made")
def _made(simulated_cities: list[gpd.City]):
    *sources, target = simulated_cities
    zoo = gpd.harvest_cities(sources, model="tiny", key=jax.random.key(0), data=_DATA, pooled=_POOLED, config=_HARVEST)
    hypernetwork = gpd.pretrain(zoo, key=jax.random.key(1), config=_PRETRAIN)
    params = hypernetwork.generate(gpd.target_prompts(target, support_days=3), key=jax.random.key(2), config=_GENERATE)
    forecast = gpd.forecast(params, target)
    return zoo, hypernetwork, params, forecast


def test_the_five_lines_forecast_every_test_window_in_the_datas_units(made, simulated_cities):
    _, _, _, forecast = made
    target = simulated_cities[-1]
    windows = round(0.3 * target.num_steps) - 6 + 1
    assert forecast.shape == (windows, target.num_nodes, 6) and forecast.dtype == np.float32
    assert np.isfinite(forecast).all()
    # In the data's units: closer to the truth than zero is, region by region.
    steps = target.num_steps - round(0.3 * target.num_steps) + np.arange(windows)[:, None] + np.arange(6)
    truth = target.values[steps, :, 0].transpose(0, 2, 1)
    assert (np.nanmean(np.abs(forecast - truth), axis=(0, 2)) < np.nanmean(np.abs(truth), axis=(0, 2))).all()


def test_what_is_printed_of_a_zoo_a_generator_and_parameters_is_a_line(made, simulated_cities):
    zoo, hypernetwork, parameters, _ = made
    assert repr(zoo).startswith("<ParameterZoo of model ") and " regions x " in repr(zoo) and "crowd_0" in repr(zoo)
    assert repr(hypernetwork).startswith("<Hypernetwork {") and '"interval_minutes": 60' in repr(hypernetwork)
    assert f": 2 samples x {simulated_cities[-1].num_nodes} regions>" in repr(parameters)
    assert "no regions" in repr(parameters.replace(params={}))
    assert all(len(repr(thing)) < 1000 for thing in (zoo, hypernetwork, parameters))


def test_the_zoo_holds_every_source_region_and_its_own_gain(made, simulated_cities):
    zoo, hypernetwork, params, _ = made
    assert zoo.num_regions == sum(city.num_nodes for city in simulated_cities[:-1]) == 16
    assert zoo.model == params.model == "tiny" and hypernetwork.interval_minutes == 60
    assert (zoo.validation_mae[:, 0] <= zoo.validation_mae[:, 1]).all()
    for leaf, drawn in zip(jax.tree.leaves(zoo.pooled), jax.tree.leaves(params.params), strict=True):
        assert drawn.shape == (2, 8, *leaf.shape)
    chex.assert_trees_all_equal(hypernetwork.pooled, zoo.pooled)


def test_a_loaded_generator_forecasts_the_same_and_fine_tuning_changes_it(made, simulated_cities, tmp_path):
    _, hypernetwork, _, forecast = made
    target = simulated_cities[-1]
    hypernetwork.save(tmp_path / "hypernetwork")
    read = gpd.Hypernetwork.load(tmp_path / "hypernetwork")
    params = read.generate(gpd.target_prompts(target, support_days=3), key=jax.random.key(2), config=_GENERATE)
    np.testing.assert_array_equal(gpd.forecast(params, target), forecast)
    adapted = gpd.forecast(params, target, adapt=gpd.AdaptConfig(shared_steps=3, code_steps=2))
    assert adapted.shape == forecast.shape and np.isfinite(adapted).all() and (adapted != forecast).any()


def test_a_city_of_another_interval_or_kind_is_no_target_of_the_generator(made, simulated_cities, tmp_path):
    _, hypernetwork, params, _ = made
    target = simulated_cities[-1]
    assert (hypernetwork.interval_minutes, hypernetwork.kinds) == (60, ("crowd",))
    hypernetwork.save(tmp_path / "made")
    for generator in (hypernetwork, gpd.Hypernetwork.load(tmp_path / "made")):
        for change, words in (
            ({"interval_minutes": 30}, "readings of 60 minutes and city 'crowd_2' has readings of 30; `resample` it"),
            ({"kind": "flow"}, "cities of kind crowd and city 'crowd_2' is of kind flow; take a generator"),
        ):
            other = dataclasses.replace(target, **change)
            with pytest.raises(gpd.InputError, match=words):
                generator.prompts(other)
            # Prompts made elsewhere know their city as well.
            with pytest.raises(gpd.InputError, match=words):
                generator.generate(gpd.target_prompts(other, support_days=3), key=jax.random.key(2), config=_GENERATE)
    flow = dataclasses.replace(target, kind="flow")
    with pytest.raises(gpd.InputError, match="is of kind flow"):
        gpd.prepare_new_city(flow, hypernetwork)
    assert hypernetwork.prompts(flow, any_kind=True).cities[0].kind == "flow"
    prompts = gpd.target_prompts(flow, support_days=3)
    drawn = hypernetwork.generate(prompts, key=jax.random.key(2), config=_GENERATE, any_kind=True)
    chex.assert_trees_all_equal(drawn.params, params.params)
    assert gpd.prepare_new_city(flow, hypernetwork, any_kind=True).city.kind == "flow"


def test_speeds_in_another_unit_are_refused_even_where_every_kind_is_taken(made, simulated_cities, tmp_path):
    _, hypernetwork, _, _ = made
    metric = dataclasses.replace(hypernetwork, kinds=("speed",), speed_units=("km/h",))
    metric.save(tmp_path / "metric")
    read = gpd.Hypernetwork.load(tmp_path / "metric")
    for channel, refused in (("speed_mph", True), ("speed_kmh", False), ("speed", False)):
        city = dataclasses.replace(simulated_cities[-1], kind="speed", feature_names=(channel,))
        for any_kind in (False, True):
            if refused:
                with pytest.raises(
                    gpd.InputError, match=r"trained on speeds in km/h .* has 'speed_mph', in mph; convert"
                ):
                    gpd.prepare_new_city(city, read, any_kind=any_kind)
            else:
                assert gpd.prepare_new_city(city, read, any_kind=any_kind).city.unit in ("km/h", "speed units")


def test_parameters_are_refused_for_other_regions_than_their_own(made, simulated_cities, tmp_path):
    _, hypernetwork, params, forecast = made
    target = simulated_cities[-1]
    turned, place = np.arange(8)[::-1], np.argsort(np.arange(8)[::-1])
    other_order = dataclasses.replace(
        target,
        values=np.ascontiguousarray(target.values[:, turned]),
        node_ids=tuple(target.node_ids[node] for node in turned),
        senders=place[target.senders].astype(np.int32),
        receivers=place[target.receivers].astype(np.int32),
    )
    fewer = dataclasses.replace(params, params=jax.tree.map(lambda leaf: leaf[:, :5], params.params), city=None)
    new_city = gpd.prepare_new_city(target, hypernetwork)
    gpd.save_parameters(tmp_path / "kept", params, new_city)
    kept = gpd.load_parameters(tmp_path / "kept").parameters
    headless = dataclasses.replace(kept, params={name: leaf for name, leaf in kept.params.items() if name != "head"})
    with pytest.raises(gpd.InputError, match=r"are not those of the model 'tiny': it lacks the array 'params/head/"):
        gpd.forecast_new_city(headless, new_city)
    assert kept.city == params.city and params.city is not None and params.city.node_ids == target.node_ids
    np.testing.assert_array_equal(gpd.forecast(kept, target), forecast)
    for parameters, city, words in (
        (params, other_order, "region 0 of the parameters is 'r0' and of city 'crowd_2' 'r7'"),
        (kept, other_order, "region 0 of the parameters is 'r0' and of city 'crowd_2' 'r7'"),
        (params, simulated_cities[0], "the name of its city is 'crowd_2', not 'crowd_0'"),
        (params, dataclasses.replace(target, feature_names=("exits",)), "its channel is 'visitors', not 'exits'"),
        (params, dataclasses.replace(target, interval_minutes=30), "its minutes between readings is 60, not 30"),
        (fewer, target, "for 5 regions and city 'crowd_2' has 8"),
    ):
        with pytest.raises(gpd.InputError, match=words):
            gpd.forecast(parameters, city)
        if city.interval_minutes == 60:
            ahead = gpd.prepare_new_city(city, hypernetwork)
            with pytest.raises(gpd.InputError, match=words):
                gpd.forecast_new_city(parameters, ahead)
            with pytest.raises(gpd.InputError, match=words):
                gpd.save_parameters(tmp_path / "wrong", parameters, ahead)
    assert not (tmp_path / "wrong").exists()


def test_parameters_are_generated_from_one_variant_of_a_prompt(made, simulated_cities):
    zoo, hypernetwork, _, _ = made
    assert zoo.prompts.values.shape[:2] == (3, 16)
    with pytest.raises(gpd.InputError, match=r"hold 3 variants of every region.*prompts.variant\(index\)"):
        hypernetwork.generate(zoo.prompts, key=jax.random.key(2), config=_GENERATE)
    drawn = hypernetwork.generate(zoo.prompts.variant(1), key=jax.random.key(2), config=_GENERATE)
    assert jax.tree.leaves(drawn.params)[0].shape[:2] == (2, 16) and drawn.city is None
    assert [city.name for city in zoo.prompts.cities] == ["crowd_0", "crowd_1"]


def test_every_public_name_exists_and_has_a_docstring():
    assert list(gpd.__all__) == sorted(gpd.__all__)
    for name in gpd.__all__:
        assert getattr(gpd, name).__doc__, name


class _Stop(Exception):
    pass


def _louder(model: gpd.Model) -> gpd.Model:
    """Another model of the same name and shapes."""
    return model._replace(apply=lambda *seen: 1.5 * model.apply(*seen))


def _stop_in(stage: str):
    """Progress that ends the work when it hears of a stage, and remembers what it stages."""
    stages: list[str] = []

    def progress(name: str, done: int, metrics: dict) -> None:
        stages.append(name)
        if name == stage:
            raise _Stop

    return progress, stages


def test_a_harvest_and_a_generator_that_were_stopped_go_on_in_their_folders(simulated_cities, made, tmp_path):
    whole, hypernetwork, _, _ = made
    sources, folder = simulated_cities[:-1], tmp_path / "harvest"

    def harvest(stage: str = "", **change):
        progress, stages = _stop_in(stage)
        settings = {
            "model": "tiny",
            "key": jax.random.key(0),
            "data": _DATA,
            "pooled": _POOLED,
            "config": _HARVEST,
        } | change
        return gpd.harvest_cities(sources, folder=folder, progress=progress, **settings), stages

    with pytest.raises(_Stop):
        harvest("pooled")
    assert (folder / "checkpoints" / "pooled").is_dir() and not (folder / "pooled").exists()
    with pytest.raises(_Stop):
        harvest("harvest")
    assert (folder / "pooled").is_dir() and (folder / "zoo.partial").is_dir()
    # What is done is not done again, and the result is that of a harvest in one piece.
    zoo, stages = harvest()
    assert set(stages) <= {"harvest"} and zoo.sources is not None
    chex.assert_trees_all_equal(zoo.params, whole.params)
    (folder / "checkpoints" / "pooled" / "30").mkdir(parents=True)  # a kill came before it was removed
    again, stages = harvest()
    assert stages == [] and not (folder / "checkpoints").exists()
    chex.assert_trees_all_equal(again.params, whole.params)
    for change in (
        {"key": jax.random.key(1)},
        {"pooled": dataclasses.replace(_POOLED, steps=31)},
        {"data": gpd.DataConfig()},
    ):
        with pytest.raises(gpd.InputError, match=r"holds a harvest of other .* name another folder"):
            harvest(**change)
    model = registry._REGISTRY["tiny"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._REGISTRY, "tiny", lambda sizes: _louder(model(sizes)))
        with pytest.raises(gpd.InputError, match=r"holds a harvest of other .*model.* name another folder"):
            harvest()
    with pytest.raises(gpd.InputError, match=r"zoo' holds a zoo of other .* name another folder"):
        harvest(config=dataclasses.replace(_HARVEST, steps=20))

    def stop(done: int, metrics: dict) -> None:
        raise _Stop

    place = tmp_path / "hypernetwork"
    place.mkdir()  # an empty folder is where something is to be written
    with pytest.raises(_Stop):
        gpd.pretrain(zoo, key=jax.random.key(1), config=_PRETRAIN, folder=place, progress=stop)
    assert (tmp_path / "hypernetwork.checkpoints").is_dir() and not any(place.iterdir())
    resumed = gpd.pretrain(zoo, key=jax.random.key(1), config=_PRETRAIN, folder=place)
    chex.assert_trees_all_equal(resumed.variables, hypernetwork.variables)
    assert [path.name for path in tmp_path.glob("hypernetwork*")] == ["hypernetwork"]
    (tmp_path / "hypernetwork.checkpoints" / "30").mkdir(parents=True)
    read = gpd.pretrain(zoo, key=jax.random.key(1), config=_PRETRAIN, folder=place, progress=stop)
    assert [path.name for path in tmp_path.glob("hypernetwork*")] == ["hypernetwork"]
    chex.assert_trees_all_equal(read.variables, hypernetwork.variables)
    with pytest.raises(gpd.InputError, match="holds a generator of another zoo, settings or key"):
        gpd.pretrain(zoo, key=jax.random.key(2), config=_PRETRAIN, folder=place)
    # What a generator keeps of how windows were made counts too, though no array of the zoo tells it.
    data = dataclasses.replace(zoo.sources.config, damping=(1.0, 1.0))
    undamped = dataclasses.replace(zoo, sources=dataclasses.replace(zoo.sources, config=data))
    with pytest.raises(gpd.InputError, match="holds a generator of another zoo, settings or key"):
        gpd.pretrain(undamped, key=jax.random.key(1), config=_PRETRAIN, folder=place)


def test_what_a_configuration_needs_is_public_too_and_no_function_hides_a_package():
    for name in gpd.__all__:
        value = getattr(gpd, name)
        if not dataclasses.is_dataclass(value) or not name.endswith("Config"):
            continue
        for field in dataclasses.fields(value):
            default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
            if dataclasses.is_dataclass(default):
                assert type(default).__name__ in gpd.__all__, (name, field.name)
    for name in (
        "prompts",
        "zoo",
        "cities",
        "models",
        "data",
        "training",
        "diffusion",
        "transfer",
        "report",
        "analysis",
    ):
        assert getattr(gpd, name).__name__ == f"gpdiff_jax.{name}"
