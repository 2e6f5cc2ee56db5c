"""In: source regions of simulated cities. Out: each region's own parameters, which depend on nothing but the region."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax.cities import City
from gpdiff_jax.data.sources import Sources, prepare_sources
from gpdiff_jax.data.windows import draw_windows
from gpdiff_jax.errors import InputError
from gpdiff_jax.models import make_model
from gpdiff_jax.models.loss import batch_forecast
from gpdiff_jax.prompts.sources import with_prompts
from gpdiff_jax.zoo import harvest
from gpdiff_jax.zoo.harvest import harvest_chunks, harvest_zoo, plan_chunks, size_buckets
from gpdiff_jax.zoo.parameter_zoo import ParameterZoo, finished_chunks, load_zoo, save_zoo
from gpdiff_jax.zoo.pooled import PooledConfig, train_pooled, validation_error
from tests.zoo.linear import CONFIG, DATA, KEY, MODEL, prepare, start_of


@pytest.fixture(scope="module", name="sources")
def _sources(simulated_cities: list[City]) -> Sources:
    return prepare(simulated_cities[:2])


@pytest.fixture(scope="module", name="pooled")
def _pooled(sources: Sources) -> dict:
    return start_of(sources)


def _harvest(sources: Sources, pooled: dict, chunk: int = 32, folder=None, **change) -> ParameterZoo:
    config = dataclasses.replace(CONFIG, **change)
    return harvest_zoo(MODEL, sources, pooled, config, key=KEY, chunk=chunk, folder=folder)


@pytest.fixture(scope="module", name="harvested")
def _harvested(sources: Sources, pooled: dict) -> ParameterZoo:
    return _harvest(sources, pooled)


def _assert_same(got: ParameterZoo, want: ParameterZoo, rows: list[int], *, atol: float = 0.0) -> None:
    for name in ("params", "validation_mae", "start_mae", "step", "seed", "data_window"):
        for one, other in zip(jax.tree.leaves(getattr(got, name)), jax.tree.leaves(getattr(want, name)), strict=True):
            assert one.shape[0] == len(rows)
            np.testing.assert_allclose(one, other[rows], rtol=0, atol=atol, err_msg=name)


def test_a_regions_result_does_not_depend_on_the_size_of_a_chunk(sources, pooled, harvested):
    # The last chunk has a single region.
    _assert_same(_harvest(sources, pooled, chunk=5), harvested, list(range(16)))


def test_a_regions_result_does_not_depend_on_the_other_cities_or_their_order(simulated_cities, pooled, harvested):
    first, second = simulated_cities[:2]
    _assert_same(_harvest(prepare([second, first]), pooled), harvested, [*range(8, 16), *range(8)])
    _assert_same(_harvest(prepare([second]), pooled), harvested, list(range(8, 16)))


def test_a_regions_result_does_not_depend_on_a_region_that_is_left_out(simulated_cities, pooled):
    first, second = simulated_cities[:2]
    # No region hears the silent one: it is cut off from the graph.
    linked = (second.senders != 3) & (second.receivers != 3)
    cut = dataclasses.replace(
        second, senders=second.senders[linked], receivers=second.receivers[linked], weights=second.weights[linked]
    )
    values = np.array(second.values)
    values[: round(0.8 * len(values)), 3] = np.nan
    whole = _harvest(prepare([first, cut]), pooled)
    sources = prepare([first, dataclasses.replace(cut, values=values)])
    assert sources.num_regions == 15
    without = _harvest(sources, pooled)
    _assert_same(without, whole, [k for k in range(16) if k != 11])
    assert np.isfinite(without.validation_mae).all()


def test_regions_trained_side_by_side_agree_with_those_trained_alone(sources, pooled, harvested):
    _assert_same(_harvest(sources, pooled, regions_per_batch=4), harvested, list(range(16)), atol=1e-4)


def test_snapshots_are_sorted_and_their_errors_are_those_of_their_parameters(sources, harvested, pooled):
    errors = harvested.validation_mae
    assert errors.shape == (16, 2) and (np.diff(errors, axis=1) >= 0).all()
    assert (harvested.step % 6 == 0).all() and (harvested.step > 0).all() and (harvested.step <= 24).all()
    assert (harvested.step[:, 0] != harvested.step[:, 1]).all()
    measure = jax.jit(functools.partial(validation_error, MODEL, bank=sources.bank, table=sources.train))
    for region in (0, 9, 15):
        own = jax.tree.map(lambda leaf, r=region: leaf[r], sources.regions)
        assert float(measure(pooled, region=own)) == pytest.approx(harvested.start_mae[region], rel=1e-5)
        for snapshot in range(2):
            params = jax.tree.map(lambda leaf, r=region, s=snapshot: jnp.asarray(leaf[r, s]), harvested.params)
            assert float(measure(params, region=own)) == pytest.approx(errors[region, snapshot], rel=1e-5)
    assert errors[:, 0].mean() < harvested.start_mae.mean()


def test_more_snapshots_keep_the_better_ones(sources, pooled, harvested):
    more = _harvest(sources, pooled, snapshots=4, patience=100)
    fewer = _harvest(sources, pooled, snapshots=2, patience=100)
    np.testing.assert_array_equal(more.validation_mae[:, :2], fewer.validation_mae)
    assert (more.validation_mae[:, 0] <= harvested.validation_mae[:, 0]).all()
    # All four evaluations are among the four snapshots.
    np.testing.assert_array_equal(np.sort(more.step, axis=1), np.broadcast_to([6, 12, 18, 24], (16, 4)))


@pytest.mark.parametrize("init", ["shared", "random"])
def test_regions_may_start_from_one_draw_or_from_their_own(sources, pooled, init):
    # A learning rate of almost nothing leaves them where they start.
    made = _harvest(sources, pooled, init=init, learning_rate=1e-12)
    starts = made.params["kernel"][:, 0]
    apart = np.abs(starts[:, None] - starts[None]).max(axis=(2, 3))[~np.eye(16, dtype=bool)]
    assert (apart.max() < 1e-6) if init == "shared" else (apart.min() > 0.1)
    assert np.abs(starts - np.asarray(pooled["kernel"])).max() > 0.05


def test_a_region_is_held_to_its_start_on_the_kind_of_day_that_its_city_never_shows(simulated_cities):
    city = simulated_cities[0]
    week = dataclasses.replace(city, values=city.values[:144], start=np.datetime64("2024-01-01T00:00", "m"))
    data = dataclasses.replace(DATA, covariates="profile", support_days=1)
    sources = with_prompts(prepare_sources([week], data, key=jax.random.key(0)), [week])
    pooled = {"bias": jnp.zeros(6), "kernel": 0.03 * jax.random.normal(KEY, (6, 48))}
    np.testing.assert_array_equal(sources.train.unseen, 1.0)

    @jax.jit
    def moved(params, region):
        """How far the forecasts of weekends have gone from the pooled model's."""
        graph = jax.tree.map(lambda leaf: leaf[region], sources.graphs)
        windows = draw_windows(sources.bank, sources.train, graph.nodes, 100, key=jax.random.key(1), unseen=True)
        gone = jnp.abs(batch_forecast(MODEL, params, graph, windows) - batch_forecast(MODEL, pooled, graph, windows))
        return (gone * windows.mask).sum() / windows.mask.sum()

    distance = {}
    for count in (0, 8):
        made = _harvest(sources, pooled, anchor_windows=count)
        last = [jax.tree.map(lambda leaf, r=region: jnp.asarray(leaf[r, 0]), made.params) for region in range(8)]
        distance[count] = np.array([moved(params, jnp.int32(region)) for region, params in enumerate(last)])
        assert (made.validation_mae[:, 0] < made.start_mae).mean() > 0.5
    assert distance[8].mean() < 0.7 * distance[0].mean()


def test_a_region_that_nobody_can_validate_takes_all_steps_and_pulls_no_mean(simulated_cities, pooled, harvested):
    first, second = simulated_cities[:2]
    values = np.array(second.values)
    values[round(0.8 * len(values)) :, 3] = np.nan
    sources = prepare([first, dataclasses.replace(second, values=values)])
    assert sources.unvalidated == ["crowd_1/r3"]
    made = _harvest(sources, pooled, patience=1)
    others = np.arange(16) != 11
    assert np.isnan(made.validation_mae[11]).all() and np.isnan(made.start_mae[11])
    assert np.isfinite(made.validation_mae[others]).all() and np.isfinite(made.start_mae[others]).all()
    np.testing.assert_array_equal(made.step[11], [24, 18])  # the last snapshots, the very last first
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(made.params))
    # What is trained is what a region with readings trains, whose last steps are kept.
    long = _harvest(prepare([first, second]), pooled, patience=100, snapshots=4)
    last = int(np.flatnonzero(long.step[11] == 24)[0])
    np.testing.assert_allclose(made.params["kernel"][11, 0], long.params["kernel"][11, last], rtol=0, atol=1e-6)
    said: list[dict[str, float]] = []
    harvest_zoo(MODEL, sources, pooled, CONFIG, key=KEY, progress=lambda done, metrics: said.append(metrics))
    assert said[-1]["validation_loss"] == pytest.approx(_harvest(sources, pooled).validation_mae[others, 0].mean())
    model, log = make_model("tiny", sources.sizes), []
    config = PooledConfig(steps=2, regions=8, windows=4, evaluations=1)
    train_pooled(model, sources, config, key=KEY, progress=lambda done, metrics: log.append(metrics))
    assert np.isfinite(log[-1]["validation_loss"])


def test_a_region_whose_error_is_not_finite_is_named(sources, pooled):
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, pooled)
    with pytest.raises(FloatingPointError, match="the training of region 'crowd_0/r0' left the finite numbers"):
        _harvest(sources, broken)


def test_a_zoo_comes_back_from_disk_bit_for_bit(tmp_path, sources, pooled, harvested):
    zoo = harvested
    save_zoo(tmp_path / "zoo", zoo)
    read = load_zoo(tmp_path / "zoo", sources)
    assert (read.model, read.names, read.prompts.names) == (zoo.model, zoo.names, zoo.prompts.names)
    assert read.sources is sources and read.num_regions == 16
    for name in ("pooled", "params", "validation_mae", "start_mae", "step", "seed", "data_window", "city_index"):
        chex.assert_trees_all_equal(getattr(read, name), getattr(zoo, name))
    np.testing.assert_array_equal(read.prompts.values, zoo.prompts.values)
    stored = load_zoo(tmp_path / "zoo").prompts
    np.testing.assert_array_equal(stored.values, zoo.prompts.values)
    assert (stored.names, stored.provenance) == (zoo.prompts.names, zoo.prompts.provenance)
    # One zoo serves prompts of any parts: those of the sources that are attached count.
    other = dataclasses.replace(sources.prompts, values=sources.prompts.values + 1.0)
    read = load_zoo(tmp_path / "zoo", dataclasses.replace(sources, prompts=other))
    np.testing.assert_array_equal(read.prompts.values, other.values)
    with pytest.raises(InputError, match="no zoo at"):
        load_zoo(tmp_path / "none")


@pytest.mark.parametrize(
    ("sizes", "widths"),
    [
        ([4] * 10, [4]),
        ([3] * 90 + [10] * 10, [3, 10]),
        ([3] * 50 + [10] * 50 + [40] * 2, [3, 10, 40]),
        ([9] * 90 + [10] * 10, [10]),
        ([2, 3, 4, 50, 51, 52, 400], [4, 52, 400]),
    ],
)
def test_buckets_are_few_and_one_hub_does_not_pad_all(sizes, widths):
    assert size_buckets(np.array(sizes), 10**6) == widths
    assert size_buckets(np.array(sizes), 10) == [max(sizes)]


def test_every_region_is_in_one_chunk_that_its_graph_fits(sources):
    plan = plan_chunks(sources, 5, 10**6)
    np.testing.assert_array_equal(np.sort(np.concatenate([chunk.rows for chunk in plan])), np.arange(16))
    assert [chunk.index for chunk in plan] == list(range(len(plan)))
    for chunk in plan:
        assert 0 < len(chunk.rows) <= 5
        assert (np.asarray(sources.graphs.n_node)[chunk.rows, 0] < chunk.num_nodes).all()
        assert (np.asarray(sources.graphs.n_edge)[chunk.rows, 0] < chunk.num_edges).all()


def test_results_do_not_depend_on_how_graphs_are_padded(sources, pooled, harvested):
    wide = [chunk._replace(num_nodes=9, num_edges=40) for chunk in plan_chunks(sources, 16, 10**6)]
    graphs = sources.graphs
    pad = functools.partial(np.pad, mode="edge")
    widened = graphs._replace(
        nodes=pad(graphs.nodes, ((0, 0), (0, 20))),
        senders=pad(graphs.senders, ((0, 0), (0, 40))),
        receivers=pad(graphs.receivers, ((0, 0), (0, 40))),
        edges=np.pad(graphs.edges, ((0, 0), (0, 40))),
    )
    made = list(harvest_chunks(MODEL, sources.replace(graphs=widened), pooled, CONFIG, wide, key=KEY))
    for chunk, result in made:
        assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
        jax.tree.map(assert_close, result.params, jax.tree.map(lambda leaf, c=chunk: leaf[c.rows], harvested.params))


def test_two_devices_make_the_same_as_one(sources, pooled, harvested):
    devices = jax.local_devices()
    assert len(devices) == 2
    alone = harvest_zoo(MODEL, sources, pooled, CONFIG, key=KEY, chunk=7, devices=devices[:1])
    _assert_same(alone, harvested, list(range(16)))


def test_in_float64_batch_chunk_bucket_and_devices_change_nothing(sources, pooled):
    """Beyond rounding: what float32 hides behind 1e-4 has to vanish."""

    def widen(tree):
        return jax.tree.map(
            lambda leaf: leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree
        )

    with jax.enable_x64(True):
        wide, start = widen(sources), widen(pooled)
        made = []
        for side_by_side, size, devices, steps in ((1, 16, 1, 10), (4, 3, 2, 10**6)):
            config = dataclasses.replace(CONFIG, regions_per_batch=side_by_side)
            plan = plan_chunks(wide, size, steps)
            chunks = harvest_chunks(MODEL, wide, start, config, plan, key=KEY, devices=jax.local_devices()[:devices])
            rows, results = zip(*((chunk.rows, result) for chunk, result in chunks), strict=True)
            order = np.argsort(np.concatenate(rows))
            made.append(jax.tree.map(lambda *leaves, order=order: np.concatenate(leaves)[order], *results))
    assert made[0].params["kernel"].dtype == np.float64
    chex.assert_trees_all_close(*made, rtol=1e-9, atol=1e-9)


def test_seeds_and_stretches_of_time_are_vectors_of_their_own_with_where_they_came_from(sources, pooled, harvested):
    made = _harvest(sources, pooled, seeds=2, data_windows=2, steps=12)
    assert made.validation_mae.shape == (16, 8) and (np.diff(made.validation_mae, axis=1) >= 0).all()
    for region in range(16):
        runs = list(zip(made.seed[region].tolist(), made.data_window[region].tolist(), strict=True))
        assert sorted(runs) == sorted([(seed, part) for seed in (0, 1) for part in (0, 1)] * 2)
    flat = made.params["kernel"].reshape(16, 8, -1)
    assert all(len(np.unique(rows, axis=0)) == 8 for rows in flat)
    with pytest.raises(InputError, match=r"`data_windows` \(=1000\) is more than the windows of 'crowd_0/r0'"):
        _harvest(sources, pooled, data_windows=1000)


def test_a_harvest_goes_on_after_its_last_chunk_with_the_same_bits(tmp_path, sources, pooled, harvested):
    folder = tmp_path / "zoo"
    whole = _harvest(sources, pooled, chunk=5, folder=folder)
    _assert_same(whole, harvested, list(range(16)))
    _assert_same(load_zoo(folder, sources), harvested, list(range(16)))
    assert not folder.with_name("zoo.partial").exists()

    stopped, written = tmp_path / "stopped", []

    class _Stop(Exception):
        pass

    def stop(done: int, metrics: dict) -> None:
        written.append(done)
        if len(written) == 2:
            raise _Stop

    with pytest.raises(_Stop):
        harvest_zoo(MODEL, sources, pooled, CONFIG, key=KEY, chunk=5, folder=stopped, progress=stop)
    assert len(finished_chunks(stopped)) == 2 and not stopped.exists()
    # What a killed writer leaves behind is not taken for a chunk.
    (stopped.with_name("stopped.partial") / "chunk_000002.orbax-checkpoint-tmp").mkdir()
    later: list[int] = []
    harvest_zoo(
        MODEL, sources, pooled, CONFIG, key=KEY, chunk=5, folder=stopped, progress=lambda done, _: later.append(done)
    )
    assert later[0] > written[-1] and later[-1] == 16
    _assert_same(load_zoo(stopped, sources), whole, list(range(16)))


def test_where_memory_runs_out_fewer_regions_are_trained_side_by_side(
    tmp_path, sources, pooled, harvested, monkeypatch, capsys
):
    make, tried = harvest._make_train_rows, []

    def with_room_for_two(model, sizes, config):
        tried.append(config.regions_per_batch)
        if config.regions_per_batch > 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")
        return make(model, sizes, config)

    monkeypatch.setattr(harvest, "_make_train_rows", with_room_for_two)
    made = _harvest(sources, pooled, folder=tmp_path / "zoo", regions_per_batch=8)
    _assert_same(made, harvested, list(range(16)), atol=2e-5)
    assert tried == [8, 4, 2]
    assert capsys.readouterr().err == (
        "no room for 8 regions side by side; the harvest goes on with 4\n"
        "no room for 4 regions side by side; the harvest goes on with 2\n"
    )
    tried.clear()
    assert harvest.measure_regions_per_batch(MODEL, sources, pooled, CONFIG, candidates=(1, 2, 4)) in (1, 2)
    monkeypatch.setattr(harvest, "_make_train_rows", _no_room)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        _harvest(sources, pooled, regions_per_batch=1)


def _no_room(*_):
    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")


def test_what_suits_the_device_is_measured(sources, pooled, harvested):
    made = _harvest(sources, pooled, regions_per_batch=0)
    _assert_same(made, harvested, list(range(16)), atol=1e-4)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"init": "zero"}, "`init` must be one of pooled, shared, random, got 'zero'"),
        ({"steps": 0}, "`steps` must be above 0, got 0"),
        ({"averaging": 1.0}, r"`averaging` must be in \[0, 1\), got 1.0"),
        ({"snapshots": 9}, r"`steps` of a region \(=24\) must be .*`snapshots` \(=9\), 54; take 54 \(--region_steps\)"),
        ({"steps": 26}, r"`steps` of a region \(=26\) must be .*; take 30 \(--region_steps\)"),
    ],
)
def test_a_configuration_out_of_range_is_refused(values, words):
    with pytest.raises(InputError, match=words):
        dataclasses.replace(CONFIG, **values)
