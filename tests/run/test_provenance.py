"""In: stages of one run in the folder of another. Out: those that it could have made itself; the others are refused."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from gpdiff_jax import InputError, Run
from tests.runs import tiny_settings

_STAGES = ("pooled", "zoo", "hypernetwork")


@pytest.fixture(name="folder")
def _folder(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def test_a_stage_of_another_run_is_refused_and_made_anew_where_it_is_removed(folder, data_dir, tmp_path):
    settings = tiny_settings(data_dir, methods=("pooled_zero_shot",))
    with Run.open(tmp_path / "other", dataclasses.replace(settings, seed=1)) as other:
        elsewhere = jax.tree.map(np.asarray, other.pooled)
    with Run.open(folder, settings) as run:
        own = jax.tree.map(np.asarray, run.pooled)
    shutil.rmtree(folder / "pooled")
    shutil.copytree(tmp_path / "other" / "pooled", folder / "pooled")
    with Run.open(folder, settings) as run:
        with pytest.raises(
            InputError, match=r"pooled' is another run's \(settings\.seed 1, now 0\); remove it, and it"
        ):
            _ = run.pooled
        shutil.rmtree(folder / "pooled")
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, run.pooled), own)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(elsewhere), strict=True))


@pytest.mark.parametrize("stage", _STAGES)
@pytest.mark.parametrize("change", ["city", "setting", "stage", "broken"])
def test_what_is_made_of_something_else_is_named(folder, data_dir, stage, change):
    path = folder / stage / "made_of.json"
    held = json.loads(path.read_text())
    words = {
        "city": r"is another run's \(cities\.crowd_1 other, now [0-9a-f]+\)",
        "setting": r"is another run's \(settings\.interval_minutes 30, now 60\)",
        "stage": r"is another run's \(stage another, now",
        "broken": "made_of.json is not JSON",
    }
    held["cities"]["crowd_1"] = "other" if change == "city" else held["cities"]["crowd_1"]
    held["settings"]["interval_minutes"] = 30 if change == "setting" else 60
    held["stage"] = "another" if change == "stage" else stage
    path.write_text(json.dumps(held)[: -1 if change == "broken" else None])
    with Run.open(folder, tiny_settings(data_dir)) as run, pytest.raises(InputError, match=words[change]):
        getattr(run, stage)


def test_stages_serve_every_run_that_would_make_them_alike(folder, data_dir, tmp_path, monkeypatch):
    settings = tiny_settings(data_dir)
    adapt = dataclasses.replace(settings.adapt, shared_steps=3)
    with Run.open(tmp_path / "new", dataclasses.replace(settings, adapt=adapt)) as run:
        for stage in _STAGES:
            shutil.copytree(folder / stage, run.folder / stage)
        (run.folder / "zoo" / "made_of.json").unlink()  # as earlier versions left it
        for name in ("train_pooled", "harvest_zoo", "pretrain"):
            monkeypatch.setattr(f"gpdiff_jax.run.stages.{name}", None)
        assert run.hypernetwork.model.name == "tiny" and run.zoo.num_regions > 0 and run.pooled
        assert (run.folder / "zoo" / "made_of.json").read_bytes() == (folder / "zoo" / "made_of.json").read_bytes()
        # What is generated hangs on how it is drawn, and for whom.
        shutil.copytree(folder / "generated", run.folder / "generated")
        assert run.generated.params[0]
    generate = dataclasses.replace(settings.generate, samples=3)
    with Run.open(tmp_path / "third", dataclasses.replace(settings, generate=generate)) as run:
        shutil.copytree(folder / "generated", run.folder / "generated")
        with pytest.raises(InputError, match=r"generated' is another run's \(settings\.generate\.samples 2, now 3\)"):
            _ = run.generated
