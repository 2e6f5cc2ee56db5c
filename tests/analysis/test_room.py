"""In: a city, and a generator that never saw it. Out: its room, and what is reached of it, as sums by hand have it."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

import gpdiff_jax as gpd
from gpdiff_jax.analysis.room import (
    LEAST_ROOM,
    METHODS,
    OwnParameters,
    RoomConfig,
    held_out_targets,
    measure_room,
    own_parameters,
)
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.errors import InputError
from gpdiff_jax.transfer.evaluate import observed_truth, zero_shot
from gpdiff_jax.zoo.pooled import PooledConfig, broadcast_regions
from tests.runs import tiny_settings

_HARVEST = tiny_settings(pathlib.Path()).harvest
_CONFIG = RoomConfig(
    stretches=2,
    test_days=1,
    harvest=dataclasses.replace(_HARVEST, steps=160, evaluate_every=40, learning_rate=3e-3),
    city=PooledConfig(steps=40, regions=4, windows=4, evaluations=2),
    generate=gpd.GenerateConfig(samples=2, steps=3),
    adapt=gpd.AdaptConfig(code_steps=2, shared_steps=3),
)


@pytest.fixture(scope="module")
def generator(simulated_cities):
    settings = tiny_settings(pathlib.Path())
    zoo = gpd.harvest_cities(
        simulated_cities[:2], model="tiny", key=jax.random.key(0), data=settings.data, pooled=settings.pooled,
        config=settings.harvest,
    )  # fmt: skip
    return gpd.pretrain(zoo, key=jax.random.key(1), config=settings.pretrain)


def test_parameters_of_a_city_are_trained_from_those_of_the_others(simulated_cities, generator):
    # Its days rise and fall in slow waves, which no city of the generator does.
    city = simulated_cities[2]
    waves = np.exp(0.5 * np.sin(2 * np.pi * np.arange(city.num_steps) / 29))
    values = (city.values * waves[:, None, None]).astype(np.float32)
    values[: round(0.8 * city.num_steps), 5] = np.nan  # its training span shows nothing of this region
    city = dataclasses.replace(city, values=values)
    made = own_parameters(city, generator.model, generator.pooled, generator.data, _CONFIG, key=jax.random.key(2))
    pooled = broadcast_regions(generator.pooled, city.num_nodes)
    moved = jax.tree.map(
        lambda own, start: np.abs(own - start)[0].reshape(city.num_nodes, -1).max(axis=1), made.own, pooled
    )
    most = np.stack(jax.tree.leaves(moved)).max(axis=0)
    assert most[5] == 0 and (np.delete(most, 5) > 1e-3).all()
    for leaf in jax.tree.leaves(made.city):
        np.testing.assert_array_equal(leaf[0, 0], leaf[0, -1])
    # Better where they were chosen, each by what it may know.
    target = held_out_targets(city, generator.data, dataclasses.replace(_CONFIG, stretches=1, test_days=2))[0]
    target = dataclasses.replace(target, damping=(1.0, 1.0))
    truth = observed_truth(city, target)[0]
    errors = [
        np.nanmean(np.abs(zero_shot(generator.model, target, params).forecast - truth)) for params in (pooled, *made)
    ]
    assert errors[1] < errors[0] and errors[2] < errors[0]


def test_supports_lie_right_before_what_is_forecast_in_the_last_fifth(simulated_cities):
    city = simulated_cities[0]  # 14 days, of which the last 2.8 are nobody's
    targets = held_out_targets(city, DataConfig(), RoomConfig(stretches=3, test_days=7))
    boundary = round(0.8 * city.num_steps)
    assert len(targets) == 3
    for target in targets:
        split = target.split
        assert split.support.stop == split.test.start and len(split.support) == 72
        assert split.test.start >= boundary and split.test.stop <= city.num_steps and len(split.test) == 24
        first = np.asarray(target.test_starts) + 12
        assert first.min() >= split.test.start and first.max() + 6 <= split.test.stop
    firsts = [target.split.test.start for target in targets]
    assert firsts == sorted(set(firsts)) and firsts[-1] == city.num_steps - 24
    # A long one has stretches of a week, apart.
    tiles = dataclasses.replace(city, values=np.tile(city.values, (8, 1, 1)))
    weeks = held_out_targets(tiles, DataConfig(), RoomConfig(stretches=2))
    assert [len(target.split.test) for target in weeks] == [168, 168]
    assert weeks[0].split.test.stop < weeks[1].split.test.start
    # Of four days the last fifth is less than one, and no stretch leaves it.
    days = dataclasses.replace(city, values=city.values[: 4 * 24])
    for target in held_out_targets(days, DataConfig(), RoomConfig()):
        assert target.split.test.start >= round(0.8 * 96) and target.split.test.stop == 96
    values = np.array(city.values)
    values[boundary - 72 :] = np.nan
    with pytest.raises(InputError, match="city 'crowd_0' shows nothing in its last 20 %; leave it out"):
        held_out_targets(dataclasses.replace(city, values=values), DataConfig(), RoomConfig())


def test_shares_are_the_part_of_the_way_from_pooled_to_own(simulated_cities, generator):
    city = simulated_cities[2]
    pooled = broadcast_regions(generator.pooled, city.num_nodes)
    data = generator.data
    own = own_parameters(city, generator.model, generator.pooled, data, _CONFIG, key=jax.random.key(2))
    found = measure_room(city, generator, own, key=jax.random.key(3), config=_CONFIG)
    errors = found["error"]
    assert tuple(errors) == METHODS and all(np.isfinite(value) for value in errors.values())
    sums, count = dict.fromkeys(METHODS, 0.0), 0
    for target, row in zip(held_out_targets(city, data, _CONFIG), found["stretches"], strict=True):
        read = int(np.isfinite(observed_truth(city, target)[0]).sum())
        count += read
        for name in METHODS:
            sums[name] += read * row[name]
    assert found["readings"] == count
    for name in METHODS:
        assert errors[name] == pytest.approx(sums[name] / count)
    room = errors["pooled"] - min(errors["own"], errors["city"])
    assert found["room"] == pytest.approx(room / errors["pooled"]) and found["room"] > LEAST_ROOM
    assert found["share"] == pytest.approx({name: (errors["pooled"] - errors[name]) / room for name in METHODS[2:]})
    # Where own parameters are the pooled ones, there is no room to reach.
    undamped = dataclasses.replace(generator, data=dataclasses.replace(data, damping=(1.0, 1.0)))
    nothing = measure_room(city, undamped, OwnParameters(pooled, pooled), key=jax.random.key(3), config=_CONFIG)
    assert nothing["room"] == 0 and set(nothing["share"].values()) == {None}
    assert nothing["error"]["own"] == nothing["error"]["city"] == nothing["error"]["pooled"]
    # What a city's own parameters say is not damped: that is for models of other cities.
    damped = measure_room(city, generator, OwnParameters(pooled, pooled), key=jax.random.key(3), config=_CONFIG)
    assert damped["error"]["own"] == nothing["error"]["own"] and damped["error"]["pooled"] != damped["error"]["own"]
