"""In: files in which a system tells its memory, and work that is too large for it. Out: parts that fit, or one line."""

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax import host_memory
from gpdiff_jax.cities import City
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.data.sources import prepare_sources
from gpdiff_jax.errors import is_out_of_memory
from gpdiff_jax.training import parallel
from gpdiff_jax.training.memory import NoRoomError, bytes_of, check_room, free_bytes
from gpdiff_jax.training.parallel import ShardedRows, map_chunks

_MIB = 2**20


@pytest.fixture(name="system")
def _system(tmp_path, monkeypatch) -> pathlib.Path:
    """A machine with 64 MiB and no control group."""
    (tmp_path / "meminfo").write_text("MemTotal:  131072 kB\nMemFree: 10 kB\nMemAvailable:  65536 kB\nHugePages: 0\n")
    monkeypatch.setattr(host_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "_CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(host_memory, "_OWN_GROUPS", tmp_path / "own")
    return tmp_path


@pytest.mark.parametrize("place", ["", "job/step"])
@pytest.mark.parametrize("version", [1, 2])
def test_the_least_of_machine_and_control_group_is_free(system, version, place):
    assert free_bytes() == free_bytes(jax.devices("cpu")[0]) == 64 * _MIB
    own = {1: "12:cpu:/elsewhere\n4:memory:/job/step/inner\n", 2: "0::/job/step/inner\n"}[version]
    (system / "own").write_text(own)
    group = system / "groups" / ("memory" if version == 1 else "") / place
    group.mkdir(parents=True)
    limit, used = ("limit_in_bytes", "usage_in_bytes") if version == 1 else ("max", "current")
    (group / f"memory.{used}").write_text(f"{50 * _MIB}\n")
    prefix = "total_" if version == 1 else ""
    stat = f"cache 5\n{prefix}inactive_file {6 * _MIB}\n{prefix}active_file {4 * _MIB}\n"
    (group / "memory.stat").write_text(stat)
    (group / f"memory.{limit}").write_text(f"{60 * _MIB}\n")
    assert free_bytes() == 20 * _MIB
    (group / f"memory.{limit}").write_text("9223372036854771712\n" if version == 1 else "max\n")
    assert free_bytes() == 64 * _MIB
    (group / f"memory.{limit}").write_text("0\n")
    assert free_bytes() == 0


def test_a_system_that_does_not_tell_refuses_nothing(system):
    (system / "meminfo").unlink()
    assert free_bytes() is None
    check_room(2**60, "everything")


def test_what_does_not_fit_is_refused_in_one_line(system):
    check_room(64 * _MIB, "all of it")
    with pytest.raises(NoRoomError, match=r"^ten cities would take 65 MiB and this machine has 64 MiB free$") as caught:
        check_room(65 * _MIB, "ten cities")
    assert is_out_of_memory(caught.value)
    with pytest.raises(NoRoomError, match=r"would take 1024\.0 GiB"):
        check_room(2**40, "ten cities")


def test_bytes_of_arrays_shapes_and_keys_are_counted():
    tree = {"a": np.zeros((3, 5), np.float32), "b": jax.ShapeDtypeStruct((2,), jnp.bfloat16), "c": jax.random.key(0)}
    assert bytes_of(tree) == 60 + 4 + 8


def test_series_that_do_not_fit_are_refused_before_they_are_built(system, simulated_cities: list[City]):
    (system / "meminfo").write_text("MemAvailable: 10 kB\n")
    with pytest.raises(NoRoomError, match=r"^the series of 8 regions, seen through 48 windows each, would take "):
        prepare_sources(simulated_cities[:1], DataConfig(), key=jax.random.key(0))


def test_the_estimate_of_series_is_what_they_take(simulated_cities: list[City], monkeypatch):
    wanted = []
    monkeypatch.setattr("gpdiff_jax.data.series.check_room", lambda count, what: wanted.append(count))
    for config in (DataConfig(), DataConfig(covariates="calendar"), DataConfig(variants=3)):
        bank = prepare_sources(simulated_cities[:2], config, key=jax.random.key(0)).bank
        assert 0.95 * bytes_of(bank) < wanted.pop() <= bytes_of(bank)


def _work(shared, rows):
    return {"sum": rows["x"].sum(axis=1) + shared, "row": rows["x"] * 2}


@pytest.mark.parametrize("count", [1500, 2048, 3001])
def test_rows_for_which_there_is_no_room_are_worked_on_in_parts_with_the_same_result(system, monkeypatch, count):
    rows = {"x": np.random.default_rng(0).normal(size=(count, 96)).astype(np.float32)}
    spread, calls, sizes = ShardedRows(_work, jnp.float32(3)), itertools.count(), []
    whole = spread(rows).read()
    call = ShardedRows.__call__
    monkeypatch.setattr(
        ShardedRows, "__call__", lambda own, cut: (next(calls), sizes.append(len(cut["x"])), call(own, cut))[2]
    )
    jax.tree.map(np.testing.assert_array_equal, spread.map(rows), whole)
    assert sizes == [count]
    sizes.clear()
    (system / "meminfo").write_text(f"MemAvailable: {4 * 512 * (2 * 96 + 1) * 4 // 1024} kB\n")  # for 512 of them
    jax.tree.map(np.testing.assert_array_equal, spread.map(rows), whole)
    assert len(sizes) > 2 and max(sizes) <= 512 and sum(sizes) == count


def test_joint_rows_that_do_not_fit_on_an_accelerator_are_refused(system, monkeypatch):
    monkeypatch.setattr(parallel, "_is_host_memory", lambda devices: False)
    rows, spread = {"x": np.ones((3001, 96), np.float32)}, ShardedRows(_work, jnp.float32(3), joint=True)
    assert spread(rows).read()["row"].shape == (3001, 96)
    # A row and its result are 193 numbers; each of the two devices gets 1501.
    (system / "meminfo").write_text(f"MemAvailable: {1501 * 193 * 4 // 1024} kB\n")
    with pytest.raises(NoRoomError, match="of 3001 regions and samples that are tuned together would take 1 MiB"):
        spread(rows)


def test_chunks_are_read_while_others_are_in_work(monkeypatch):
    """So that not the results of all lie on a device."""
    alive, most, rows = 0, 0, np.arange(640, dtype=np.float32)[:, None]
    put, pmap = parallel._put, parallel._pmap

    def counted(function, devices):
        mapped = pmap(function, devices)

        def call(shared, chunk):
            nonlocal alive, most
            alive, most = alive + 1, max(most, alive + 1)
            return mapped(shared, chunk)

        return call

    def read(whole, part, first, count):
        nonlocal alive
        alive -= 1
        return put(whole, part, first, count)

    monkeypatch.setattr(parallel, "_pmap", counted)
    monkeypatch.setattr(parallel, "_put", read)
    made = map_chunks(lambda shared, rows: rows + shared, np.float32(1), rows, size=16)
    np.testing.assert_array_equal(made, rows + 1)
    assert alive == 0 and most == 3
