"""In: source cities. Out: parameters that a few steps on some days of a city suit to it better than others."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.baselines import meta_learned
from gpdiff_jax.baselines.meta_learned import MetaConfig, adapt_meta_learned, meta_learn
from gpdiff_jax.cities import City
from gpdiff_jax.data.target import prepare_target
from gpdiff_jax.errors import InputError
from gpdiff_jax.training.step import Part
from gpdiff_jax.zoo.pooled import PooledConfig, broadcast_regions
from tests.zoo.linear import DATA, KEY, MODEL, prepare, start_of

_CONFIG = MetaConfig(steps=60, episodes=3, regions=4, windows=4, learning_rate=1e-2, inner_steps=3, inner_rate=0.1)


@pytest.fixture(scope="module", name="sources")
def _sources(simulated_cities: list[City]):
    return prepare(simulated_cities[:2])


def _error(sources, params, config, key) -> float:
    """Of tasks after their steps."""
    sums = functools.partial(meta_learned._sums, MODEL, config)
    total, count, _ = jax.jit(lambda *given: sums(*given, Part(jnp.int32(0), config.episodes, jnp.int32(0)), key))(
        params, sources
    )
    return float(total / count)


def test_steps_lead_further_from_what_was_learned_for_them(sources):
    start, many = start_of(sources), dataclasses.replace(_CONFIG, episodes=40)
    learned = meta_learn(MODEL, sources, start, _CONFIG, key=KEY)
    before, after = (_error(sources, params, many, jax.random.key(5)) for params in (start, learned))
    assert after < 0.9 * before
    # The steps help, and it is with them that it was learned: without any it is further from the truth.
    assert after < 0.98 * _error(sources, learned, dataclasses.replace(many, inner_rate=1e-9), jax.random.key(5))


def test_a_task_shows_windows_of_its_days_through_other_days(sources, monkeypatch):
    shown, bank, table = [], sources.bank, sources.train
    gather = meta_learned.gather_draw
    monkeypatch.setattr(
        meta_learned, "gather_draw", lambda bank, nodes, draw: (shown.append(draw), gather(bank, nodes, draw))[1]
    )
    for variant in range(3):
        graph = jax.tree.map(lambda leaf: leaf[9], sources.graphs)
        window = meta_learned._windows_within(sources, graph, jnp.int32(variant), 40, key=jax.random.key(variant))
        begin, end = np.asarray(table.spans[variant, graph.nodes[0]])
        draw = shown.pop()
        starts, seen_through = np.asarray(draw.starts), np.asarray(draw.variants)
        assert (starts >= begin).all() and (starts + bank.history + bank.horizon <= end).all()
        assert len(set(starts.tolist())) > 10
        allowed = np.asarray(draw.allowed)
        assert (seen_through[allowed] != variant).all() and allowed.any()
        assert not np.asarray(window.mask)[~allowed].any()


def test_it_asks_of_other_days_seen_through_these_and_rather_of_near_ones(sources, monkeypatch):
    shown, bank, gather, gaps = [], sources.bank, meta_learned.gather_draw, {0.0: [], 2.0: []}
    monkeypatch.setattr(
        meta_learned, "gather_draw", lambda bank, nodes, draw: (shown.append(draw), gather(bank, nodes, draw))[1]
    )
    graph = jax.tree.map(lambda leaf: leaf[9], sources.graphs)
    for (near_days, found), variant in itertools.product(gaps.items(), range(3)):
        table = dataclasses.replace(sources.train, near_days=near_days)
        beside = dataclasses.replace(sources, train=table)
        meta_learned._windows_beside(beside, graph, jnp.int32(variant), 60, key=jax.random.key(variant))
        begin, end = np.asarray(table.spans[variant, graph.nodes[0]])
        draw = shown.pop()
        starts = np.asarray(draw.starts)
        assert np.asarray(draw.allowed).all() and (np.asarray(draw.variants) == variant).all()
        assert ((starts >= end) | (starts + bank.history + bank.horizon <= begin)).all()
        found += np.maximum(begin - starts, starts - end).tolist()
    assert np.median(gaps[2.0]) < 0.8 * np.median(gaps[0.0])


def test_a_task_is_of_both(sources, monkeypatch):
    asked = []
    for name in ("_windows_within", "_windows_beside"):
        make = getattr(meta_learned, name)

        def watched(*given, make=make, name=name, **more):
            asked.append(name)
            return make(*given, **more)

        monkeypatch.setattr(meta_learned, name, watched)
    _error(sources, start_of(sources), _CONFIG, jax.random.key(0))
    assert asked == ["_windows_within", "_windows_beside"]  # each is traced once
    alone = dataclasses.replace(sources, config=dataclasses.replace(sources.config, variants=1))
    with pytest.raises(InputError, match=r"`variants` \(=1\) must be at least 2"):
        meta_learn(MODEL, alone, start_of(sources), _CONFIG, key=KEY)


@pytest.mark.parametrize(("gradient", "length"), [(8.0, 0.1), (0.5, 0.05), (0.0, 0.0)])
def test_steps_within_a_task_are_clipped_and_have_a_derivative(gradient, length):
    params = {"bias": jnp.zeros(3), "kernel": jnp.zeros((2, 3))}
    grads = jax.tree.map(lambda leaf: gradient / 3 * jnp.ones_like(leaf), params)  # nine entries
    stepped = meta_learned._step(params, grads, 0.1)
    jax.tree.map(lambda leaf: np.testing.assert_allclose(leaf, -length / 3 * jnp.ones_like(leaf), rtol=1e-6), stepped)
    by = jax.jacobian(lambda grads: meta_learned._step(params, grads, 0.1)["bias"][0])(grads)
    # Along itself, a clipped gradient changes nothing.
    along = sum(float(leaf.sum()) for leaf in jax.tree.leaves(by))
    np.testing.assert_allclose(along, 0.0 if gradient > 1 else -0.1, atol=1e-7)


def test_a_target_is_moved_as_a_whole_by_the_steps_that_were_learned_for(simulated_cities, sources):
    target = prepare_target(simulated_cities[2], DATA)
    starts = broadcast_regions(start_of(sources), target.num_regions)
    moved = adapt_meta_learned(MODEL, target, starts, _CONFIG, key=KEY)
    difference = jax.tree.map(lambda after, before: after - before, moved, starts)
    for leaf in jax.tree.leaves(difference):
        assert np.abs(leaf).max() > 0
        np.testing.assert_allclose(leaf, np.broadcast_to(leaf[:, :1], leaf.shape), atol=1e-7)
    # Plain steps are as long as their gradients.
    half = dataclasses.replace(_CONFIG, inner_steps=1, inner_rate=_CONFIG.inner_rate / 2)
    one, other = (
        adapt_meta_learned(MODEL, target, starts, config, key=KEY)["kernel"] - starts["kernel"]
        for config in (dataclasses.replace(_CONFIG, inner_steps=1), half)
    )
    np.testing.assert_allclose(one, 2 * other, rtol=1e-3, atol=1e-7)


def test_a_configuration_out_of_range_is_refused():
    with pytest.raises(InputError, match="`inner_steps` must be above 0, got 0"):
        MetaConfig(inner_steps=0)
    assert (
        MetaConfig.beside(PooledConfig(steps=2000)).steps == 250 and MetaConfig.beside(PooledConfig(steps=3)).steps == 1
    )
