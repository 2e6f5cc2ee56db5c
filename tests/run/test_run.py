"""In: cities in memory and settings. Out: a run from Python that is the run of the command line."""

import dataclasses
import errno
import functools
import json
import os
import shutil

import numpy as np
import pytest

import gpdiff_jax as gpd
from gpdiff_jax.folder_lock import _held, lock_folder, unlock_folder
from gpdiff_jax.models import registry
from gpdiff_jax.run.settings import METHODS
from tests.runs import tiny_settings, without_seconds
from tests.tiny import make_tiny, scale_and_bias


def _cities(data_dir) -> list[gpd.City]:
    return [gpd.load_city(data_dir / f"crowd_{k}.npz") for k in range(3)]


def test_cities_from_memory_are_those_of_the_files(finished, data_dir, tmp_path, monkeypatch):
    folder, content = finished
    shutil.copytree(folder, tmp_path / "run")
    settings = dataclasses.replace(tiny_settings(data_dir), data_dir=None)
    with gpd.Run.open(tmp_path / "run", settings, cities=_cities(data_dir)) as run:
        assert run.evaluate() == content and repr(run).endswith("run': crowd_0, crowd_1 to crowd_2>")
        assert run.table().splitlines()[1].split()[0] in content["methods"]
        made = run.forecast("gpdiff_few_shot")
        with np.load(folder / "forecasts.npz") as held:
            np.testing.assert_array_equal(made.forecast, held["gpdiff_few_shot"])
        mistakes = [
            ("magic", 0, "`methods` names 'magic', which is no method"),
            ("all", 0, "`method` is one method, got 'all'"),
            ("last_value", 1, "below 1, got 1"),
        ]
        for method, channel, words in mistakes:
            with pytest.raises(gpd.InputError, match=words):
                run.forecast(method, channel)
        monkeypatch.setattr("gpdiff_jax.run.run.num_hosts", lambda: 2)
        for alone in (run.diagnose, run.inspect_prompts, run.measure_rooms):
            with pytest.raises(gpd.InputError, match="for this, open the run on one host"):
                alone()
    for closed in (run.evaluate, run.diagnose, run.inspect_prompts, lambda: run.forecast("last_value")):
        with pytest.raises(gpd.InputError, match=r"the run in .* is closed; open it again"):
            closed()


def test_a_run_that_is_made_from_memory_has_the_numbers_of_the_files(finished, data_dir, tmp_path):
    _, content = finished
    settings = dataclasses.replace(tiny_settings(data_dir, methods=("last_value", "pooled_zero_shot")), data_dir=None)
    made = gpd.Run.open(tmp_path / "run", settings, cities=_cities(data_dir)).evaluate()
    assert made["methods"].keys() == {"last_value", "pooled_zero_shot"}
    for name, entry in without_seconds(made)["methods"].items():
        assert entry == without_seconds(content)["methods"][name]


def test_cities_that_are_not_those_of_the_settings_are_refused(data_dir, tmp_path):
    cities, settings = _cities(data_dir), dataclasses.replace(tiny_settings(data_dir), data_dir=None)
    swapped = [cities[0], cities[2], cities[1]]
    with pytest.raises(
        gpd.InputError, match="`cities` are crowd_0, crowd_2, crowd_1, but the settings name crowd_0, crow"
    ):
        gpd.Run.open(tmp_path / "run", settings, cities=swapped)
    with pytest.raises(gpd.InputError, match="the settings name no `data_dir`; give the folder of the city files, or"):
        gpd.Run.open(tmp_path / "run", settings)
    broken = np.array(cities[1].values)
    broken[3, 2] = np.inf
    spoiled = [cities[0], dataclasses.replace(cities[1], values=broken), cities[2]]
    for others, change, words in [
        (spoiled, {}, "infinite"),
        ([], {}, "`cities` are none, but the settings name crowd_0"),
        (tuple(cities), {"missing_above": 9.0}, "`missing_above` is for files"),
    ]:
        with pytest.raises(gpd.InputError, match=words):
            gpd.Run.open(tmp_path / "run", dataclasses.replace(settings, **change), cities=others)
    assert not (tmp_path / "run").exists()


def test_another_model_of_the_same_name_is_another_run_and_a_refused_one_holds_no_lock(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    settings = tiny_settings(data_dir, methods=("last_value",))
    gpd.Run.open(tmp_path, settings).close()
    monkeypatch.setitem(registry._REGISTRY, "tiny", functools.cache(scale_and_bias))
    with pytest.raises(gpd.InputError, match="holds a run of another model of that name; name another folder"):
        gpd.Run.open(tmp_path, settings)
    lock_folder(tmp_path)
    unlock_folder(tmp_path)
    assert tmp_path.resolve() / ".lock" not in _held
    monkeypatch.setitem(registry._REGISTRY, "tiny", make_tiny)
    gpd.Run.open(tmp_path, settings).close()
    config = tmp_path / "config.json"
    held = json.loads(config.read_text())
    config.write_text(json.dumps(held | {"format": held["format"] - 1}))
    with pytest.raises(gpd.InputError, match="holds a run of another version of this program; name another folder"):
        gpd.Run.open(tmp_path, settings)


def test_a_full_disk_is_not_taken_for_another_programs_folder(data_dir, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("gpdiff_jax.run.folder.write_json", full)
    with pytest.raises(OSError, match="No space left on device"):
        gpd.Run.open(tmp_path, tiny_settings(data_dir))
    assert tmp_path.resolve() / ".lock" not in _held


def test_a_preset_takes_a_model_of_ones_own_and_refuses_what_does_not_go_together(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    (tmp_path / "own.py").write_text("import gpdiff_jax as gpd\ngpd.register_model('own', lambda sizes: None)\n")
    settings = gpd.Settings.from_preset("tiny", model=str(tmp_path / "own.py"), seed=3)
    assert (settings.model, settings.seed, settings.data.variants) == ("own", 3, 4)
    assert settings.simulation == gpd.SimulationConfig() and len(settings.model_file_sha256) == 64
    named = gpd.Settings.from_preset("small", data_dir=tmp_path, sources=["a"], target="b", methods=["all"])
    assert named.simulation is None and (named.data_dir, named.sources) == (str(tmp_path), ("a",))
    assert named.methods == METHODS
    for changes, words in [
        ({"sources": ("a", "a"), "target": "b"}, "`sources` names 'a' twice"),
        ({"sources": ("a", "b"), "target": "b"}, "target 'b' is also a source"),
        (
            {"methods": ("gpdiff_few",)},
            "`methods` names 'gpdiff_few', which is no method; did you mean gpdiff_few_shot",
        ),
        ({"methods": "all"}, "`methods` must be a tuple of names, got 'all'"),
        ({"sources": "ab", "target": "b"}, "`sources` must be a tuple of names, got 'ab'"),
        ({"data_dir": "d", "target": "b"}, "`sources` is missing, the names of cities; without any, cities are simu"),
        ({"data_dir": "d", "sources": ("a",)}, "`target` is missing"),
        ({"data_dir": "d"}, "`sources` is missing"),
        ({"data": {"covariates": "calendar"}}, "`data` must be a DataConfig, got dict"),
        ({"seed": 1.5}, "`seed` must be a whole number, got 1.5"),
        ({"seed": -1}, "`seed` must be at least 0 and below 2 .. 31, got -1"),
        ({"covariates": "calendar"}, "the settings have no `covariates`; it is a field of `data`"),
        ({"targett": "b"}, "the settings have no `targett`; did you mean `target`"),
        ({"generate": gpd.GenerateConfig(sampler="euler")}, "`sampler` 'euler' needs schedule 'rectified_flow'"),
    ]:
        with pytest.raises(gpd.InputError, match=words):
            gpd.Settings.from_preset("tiny", **changes)
    with pytest.raises(gpd.InputError, match="`preset` must be one of tiny, demo, small, paper, got 'huge'"):
        gpd.Settings.from_preset("huge")
