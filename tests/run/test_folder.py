"""In: a finished run that is killed, moved, damaged, or asked for something else. Out: it goes on, or says why not."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments.run_flags import settings_from_flags
from gpdiff_jax import Run
from gpdiff_jax.cities import City, load_city, save_city
from gpdiff_jax.errors import InputError
from gpdiff_jax.models import registry
from gpdiff_jax.training.progress import read_log
from tests.runs import tiny_settings, without_seconds


@pytest.mark.parametrize(
    "lost",
    [
        ("hypernetwork", "generated", "methods"),
        ("generated", "methods"),
        ("methods/gpdiff_few_shot_0.npz", "methods/ridge_hypernetwork_zero_shot_0.npz"),
    ],
    ids=["after the zoo", "after pretraining", "among the methods"],
)
def test_a_killed_run_that_goes_on_ends_with_the_same_numbers(finished, data_dir, tmp_path, lost):
    folder, content = finished
    half = tmp_path / "half"
    shutil.copytree(folder, half)
    for name in (*lost, "metrics.json", "regions.csv", "forecasts.npz", "report.npz", "report.html"):
        path = half / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    # A kill may cut a line of the log short and leave temporary files.
    with (half / "log.jsonl").open("a") as log:
        log.write('{"time": 1')
    (half / ".metrics.json.x").write_text("{")
    resumed = Run.open(half, tiny_settings(data_dir)).evaluate()
    assert without_seconds(resumed) == without_seconds(content)
    with np.load(half / "forecasts.npz") as now, np.load(folder / "forecasts.npz") as then:
        for name in then.files:
            np.testing.assert_array_equal(now[name], then[name])
    assert len(read_log(half / "log.jsonl")) >= len(read_log(folder / "log.jsonl"))


@pytest.mark.parametrize("content", ["", '{"zoo": 1', "[" * 200_000, "[1]", '{"zoo": "long"}'])
def test_seconds_that_cannot_be_read_stop_no_run(finished, data_dir, tmp_path, capsys, content):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "seconds.json").write_text(content)
    shutil.rmtree(tmp_path / "run" / "methods")
    made = Run.open(tmp_path / "run", tiny_settings(data_dir, methods=("last_value",))).evaluate()
    assert made["methods"]["last_value"]["mae"] == finished[1]["methods"]["last_value"]["mae"]
    assert "seconds.json does not say how long stages took" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["[" * 200_000, "{}", "settings", "model", "words"])
def test_a_config_that_was_changed_by_hand_is_one_line(finished, data_dir, tmp_path, damage):
    shutil.copytree(finished[0], tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    held = json.loads(path.read_text())
    changed = {
        "settings": held | {"settings": "x"},
        "words": held | {"settings": held["settings"] | {"seed": "x"}},
        "model": {name: held[name] for name in held if name != "model_sha256"},
    }
    path.write_text(json.dumps(changed[damage]) if damage in changed else damage)
    with pytest.raises(
        InputError, match=r"config.json that no run|another model|other settings \(seed x, now 0\)"
    ) as refused:
        Run.open(tmp_path / "run", tiny_settings(data_dir))
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("name", ["config.json", "log.jsonl", "seconds.json"])
def test_a_pipe_in_a_run_folder_is_not_waited_for(finished, data_dir, tmp_path, name):
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "methods")
    (tmp_path / "run" / name).unlink()
    os.mkfifo(tmp_path / "run" / name)
    if name == "seconds.json":
        assert Run.open(tmp_path / "run", tiny_settings(data_dir, methods=("last_value",))).evaluate()
        return
    with pytest.raises(InputError, match=f"{name}.*(is a link, a pipe|that no run of this program wrote)"):
        Run.open(tmp_path / "run", tiny_settings(data_dir, methods=("pooled_few_shot",))).evaluate()


def test_a_stage_that_was_damaged_is_refused_by_name(finished, data_dir, tmp_path):
    folder, _ = finished
    half = tmp_path / "half"
    shutil.copytree(folder, half)
    for path in (half / "zoo").rglob("*"):
        if path.is_file():
            path.unlink()
    with pytest.raises(InputError, match=r"zoo/index' is no index of the zoo: it holds .*"):
        Run.open(half, tiny_settings(data_dir)).evaluate()


_POINTS = {"poi": np.ones((8, 1), np.float32), "poi_names": ("cafe",)}


@pytest.mark.parametrize(
    "change",
    [
        lambda city: {"values": city.values + np.float32(1)},
        lambda city: {"kind": "flow"},
        lambda city: {"feature_names": ("people",)},
        lambda city: {"poi": None if city.poi is None else 2 * city.poi, **({} if city.poi is not None else _POINTS)},
        lambda city: {"latitude": city.latitude + 1e-3},
        lambda city: {"weights": city.weights * np.float32(0.5)},
    ],
    ids=["readings", "kind", "channel", "points of interest", "places", "edges"],
)
def test_a_run_is_not_continued_with_other_readings_or_facts(finished, data_dir, tmp_path, change):
    folder, _ = finished
    other = tmp_path / "cities"
    shutil.copytree(data_dir, other)
    city = load_city(other / "crowd_1.npz")
    save_city(other / "crowd_1.npz", dataclasses.replace(city, **change(city)))
    shutil.copytree(folder, tmp_path / "run")
    with pytest.raises(InputError, match=r"holds a run on other readings or facts of city 'crowd_1'; name another"):
        Run.open(tmp_path / "run", tiny_settings(other))


def test_a_run_goes_on_from_another_place_with_other_devices_and_says_that_versions_differ(
    finished, data_dir, tmp_path, capsys
):
    folder, content = finished
    shutil.copytree(data_dir, tmp_path / "moved")
    shutil.copytree(folder, tmp_path / "run")
    settings = tiny_settings(tmp_path / "moved")
    settings = dataclasses.replace(
        settings,
        harvest=dataclasses.replace(settings.harvest, regions_per_batch=4),
        adapt=dataclasses.replace(settings.adapt, regions_per_batch=4),
        pretrain=dataclasses.replace(settings.pretrain, accumulate=2),
    )
    capsys.readouterr()
    assert Run.open(tmp_path / "run", settings).evaluate() == content
    assert "versions" not in capsys.readouterr().err
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    assert config["execution"]["data_dir"] == str(data_dir) and "data_dir" not in config["settings"]
    assert not any("regions_per_batch" in config["settings"][name] for name in ("harvest", "adapt", "target_only"))
    config["versions"]["jax"] = "0.0.1"
    path.write_text(json.dumps(config))
    Run.open(tmp_path / "run", settings)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "versions" in line]
    assert re.fullmatch(r"this run was begun with other versions \(jax 0.0.1, now [\d.]+\); its parts may differ", line)
    with pytest.raises(InputError, match=r"a run with other settings \(pooled.steps 20, now 21\); name another folder"):
        Run.open(tmp_path / "run", dataclasses.replace(settings, pooled=dataclasses.replace(settings.pooled, steps=21)))


def test_another_programs_folder_is_left_alone(data_dir, tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["X"]}')
    with pytest.raises(
        InputError, match=r"holds a config\.json that no run of this program wrote; name an empty"
    ) as raised:
        Run.open(tmp_path, tiny_settings(data_dir))
    assert "delete" not in str(raised.value) and "remove" not in str(raised.value)


def test_a_run_is_not_continued_with_another_model_file(finished, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    path = tmp_path / "own.py"
    path.write_text("import gpdiff_jax as gpd\ngpd.register_model('own', lambda sizes: None)\n")
    with flagsaver.flagsaver():
        flags.FLAGS(["run", f"--model={path}"])
        settings = settings_from_flags()
    assert settings.model == "own"
    assert settings.model_file_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    shutil.copytree(finished[0], tmp_path / "run")
    with pytest.raises(InputError, match=rf"model_file_sha256 None, now {settings.model_file_sha256}"):
        Run.open(tmp_path / "run", tiny_settings(data_dir, model_file_sha256=settings.model_file_sha256))


def test_the_targets_readings_are_in_nothing_that_is_trained_before_it(finished, data_dir, tmp_path):
    """Another target, the same sources: what is harvested does not change, so its folder can be shared."""
    folder, _ = finished
    city = load_city(data_dir / "crowd_2.npz")
    other = tmp_path / "cities"
    shutil.copytree(data_dir, other)
    save_city(other / "crowd_2.npz", dataclasses.replace(city, values=city.values * np.float32(2) + np.float32(1)))
    runs = [
        Run(tiny_settings(data_dir), folder, *_cities(data_dir)),
        Run(tiny_settings(other), tmp_path, *_cities(other)),
    ]
    for name in ("bank", "graphs", "train", "validation_starts", "prompts"):
        one, two = (jax.tree.leaves(getattr(run.prompted, name)) for run in runs)
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(a, b)
    assert str(runs[0].key("harvest")) == str(runs[1].key("harvest"))


def _cities(folder: pathlib.Path) -> tuple[list[City], list[City]]:
    cities = [load_city(folder / f"crowd_{k}.npz") for k in range(3)]
    return cities[:2], cities[2:]
