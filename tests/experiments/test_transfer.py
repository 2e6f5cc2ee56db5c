"""In: tiny runs of the main job on simulated cities, whole and mistaken.
Out: every file that was promised, and one line for every mistake.
"""

import csv
import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest

from experiments import inspect_prompts
from experiments.run_flags import run_main
from experiments.transfer import show
from gpdiff_jax import Run
from gpdiff_jax.analysis.diagnostics import DiagnosticsConfig
from gpdiff_jax.cities import load_city
from gpdiff_jax.errors import InputError
from gpdiff_jax.hypernetwork import Hypernetwork
from gpdiff_jax.prompts.encoders import PromptConfig
from gpdiff_jax.prompts.temporal.autoencoder import TemporalConfig
from gpdiff_jax.prompts.urban_graph.embedding_training import EmbeddingConfig
from gpdiff_jax.run import results
from gpdiff_jax.run.results import results_table
from gpdiff_jax.run.room import room_table
from gpdiff_jax.run.settings import DEFAULT_METHODS
from gpdiff_jax.run.stages import generate_key
from gpdiff_jax.training.progress import read_log
from gpdiff_jax.zoo.parameter_zoo import load_zoo
from tests.commands import run_here
from tests.runs import tiny_settings

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_GPDIFF = ("gpdiff_zero_shot", "gpdiff_few_shot")


def test_metrics_hold_every_method_with_finite_errors(finished):
    folder, content = finished
    assert json.loads((folder / "metrics.json").read_text()) == content
    assert set(content["methods"]) == set(DEFAULT_METHODS)
    assert {*_GPDIFF, "historical_average", "last_value", "target_only", "pooled_zero_shot"} <= set(DEFAULT_METHODS)
    expected = {
        "target": "crowd_2",
        "target_kind": "crowd",
        "unit": "visitors per 60 min",
        "horizon_minutes": [60, 120, 180, 240, 300, 360],
        "seed": 0,
        "covariates": "profile",
        "support_days": 3,
        "support": ["2024-01-13T19:00", "2024-01-16T19:00"],
        "test": ["2024-01-16T19:00", "2024-01-21T00:00"],
        "sources": ["crowd_0", "crowd_1"],
        "protocol": "leak-free",
        "regions": 8,
        "test_windows": 96,
        "silent_regions": ["r5"],
    }
    assert {name: content[name] for name in expected} == expected
    for name, entry in content["methods"].items():
        assert len(entry["mae"]) == len(entry["rmse"]) == 6, name
        numbers = [*entry["mae"], *entry["rmse"], entry["mae_mean"], entry["rmse_mean"], entry["seconds"]]
        assert np.isfinite(numbers).all() and entry["mae_mean"] == pytest.approx(np.mean(entry["mae"]))
        # Draws from the posterior take the sampler's steps and no others.
        tuned = name == "target_only" or (name.endswith("few_shot") and name != "gpdiff_posterior_few_shot")
        assert (entry["steps"] is not None) == tuned, name
        # In codes nothing is chosen on the validation day.
        assert (entry["validation_mae"] is not None) == (name == "target_only"), name


def test_forecasts_are_those_that_the_metrics_measure(finished, data_dir):
    folder, content = finished
    with np.load(folder / "forecasts.npz", allow_pickle=False) as held:
        arrays = {name: held[name] for name in held.files}
    city = load_city(data_dir / "crowd_2.npz")
    assert city.start is not None
    starts = [str(city.start + np.timedelta64(60 * (235 + k), "m")) for k in range(96)]
    assert arrays["window_start"].tolist() == starts and arrays["node_ids"].tolist() == list(city.node_ids)
    truth = np.stack([city.values[235 + k : 241 + k, :, 0].T for k in range(96)])
    np.testing.assert_array_equal(arrays["truth"], truth)
    for name in _GPDIFF:
        assert arrays[name].shape == arrays[f"{name}_std"].shape == (96, 8, 6)
        assert (arrays[f"{name}_std"] >= 0).all() and arrays[f"{name}_std"].max() > 0
        error = np.nanmean(np.abs(arrays[name].astype(np.float64) - truth), axis=(0, 1))
        np.testing.assert_allclose(content["methods"][name]["mae"], error, rtol=1e-5)


def test_every_other_file_of_a_run_is_there_and_readable(finished):
    folder, _ = finished
    with (folder / "regions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 * len(DEFAULT_METHODS)
    assert {row["region"] for row in rows if row["note"]} == {"r5"}
    assert all(float(row["mae"]) > 0 and int(row["observations"]) > 0 for row in rows)
    config = json.loads((folder / "config.json").read_text())
    assert config["seed"] == 0 and config["device_count"] >= 1 and {"jax", "flax", "optax"} <= set(config["versions"])
    log = read_log(folder / "log.jsonl")
    trained = {"residual_autoregression", "boosted_trees", "pooled", "harvest", "pretrain", "generate", "adapt"}
    assert {line["stage"] for line in log} == trained
    steps = [line["step"] for line in log if line["stage"] == "pooled"]
    assert steps == [10, 20] and all("train_loss" in line for line in log if line["stage"] == "pooled")
    page = (folder / "report.html").read_text()
    assert "<html" in page and "crowd_2" in page and "gpdiff_few_shot" in page.replace(" ", "_").lower()
    with np.load(folder / "report.npz", allow_pickle=False) as held:
        assert held["zoo_projection"].shape == (16, 2) and held["generated_projection"].shape == (16, 2)
        assert set(held["zoo_city"].tolist()) == {"crowd_0", "crowd_1"} and held["latitude"].shape == (8,)
        assert all(np.isfinite(held[name]).all() for name in held.files if held[name].dtype.kind == "f")


def test_the_projections_of_a_zoo_that_is_read_in_parts_are_those_of_its_whole(finished, data_dir, monkeypatch):
    with Run.open(finished[0], tiny_settings(data_dir)) as run:
        monkeypatch.setattr(results, "_ROWS", 16)
        whole = results._projections(run)
        parts = run.zoo.vectors.parts
        cut = [np.arange(start, start + 4) for start in (4, 12, 0, 8)]

        def four_at_a_time(own):
            ((rows, params),) = parts()
            for some in cut:
                yield rows[some], jax.tree.map(lambda leaf, some=some: leaf[some], params)

        monkeypatch.setattr(type(run.zoo.vectors), "parts", four_at_a_time)
        for name, array in results._projections(run).items():
            if name != "zoo_city":
                np.testing.assert_allclose(array, whole[name], rtol=1e-4, atol=1e-4, err_msg=name)
        monkeypatch.setattr(results, "_ROWS", 8)
        assert results._projections(run)["zoo_projection"].shape == whole["zoo_projection"].shape


def test_the_table_ranks_all_methods(finished):
    _, content = finished
    *lines, note = results_table(content).splitlines()[1:]
    assert note.startswith("errors in visitors per 60 min: crowd_2, 8 regions, ")
    assert note.endswith(" windows, 60 to 360 minutes ahead; seconds to fine-tune and forecast, and of training")
    one = results_table(content | {"horizon_minutes": [60]}).splitlines()[-1]
    assert " windows, 60 minutes ahead; " in one
    assert sorted(line.split()[0] for line in lines) == sorted(DEFAULT_METHODS)
    errors = [content["methods"][line.split()[0]]["mae_mean"] for line in lines]
    assert errors == sorted(errors)


def test_a_finished_run_is_read_back_without_training(finished, data_dir, tmp_path, monkeypatch):
    folder, content = finished
    shutil.copytree(folder, tmp_path / "run")

    def refuse(*arguments, **options):
        raise AssertionError("a finished stage ran again")

    for name in (
        "stages.train_pooled",
        "stages.harvest_zoo",
        "stages.pretrain",
        "methods.zero_shot",
        "methods.few_shot",
    ):
        monkeypatch.setattr(f"gpdiff_jax.run.{name}", refuse)
    assert Run.open(tmp_path / "run", tiny_settings(data_dir)).evaluate() == content


@pytest.mark.slow
def test_a_run_is_diagnosed_and_the_page_says_what_each_number_means(finished, data_dir, tmp_path):
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "run")
    run = Run.open(tmp_path / "run", tiny_settings(data_dir))
    config = DiagnosticsConfig(generate=run.settings.generate, shuffles=2, variants=2)
    content = run.diagnose(config)
    assert json.loads((tmp_path / "run" / "diagnostics.json").read_text()) == content
    assert [group["regions"] for group in content["groups"].values()] == [14, 2, 8]
    assert list(content["groups"]) == ["training", "held_out", "crowd_2"]
    numbers = [value for part in content["response"].values() for value in part.values()]
    assert np.isfinite(numbers).all() and len(numbers) == 10 + 6
    page = (tmp_path / "run" / "diagnostics.html").read_text()
    for words in ("Target crowd_2 (8)", "Rise by shuffling", "Effective rank", "memorised", "visitors per 60 min"):
        assert words in page, words
    assert "nan" not in page[page.index("<main>") : page.index("</main>")].lower()
    # What was drawn for the target is what the run's methods forecast with.
    drawn = run.hypernetwork.generate(run.target_prompts[0], key=generate_key(run, 0), config=run.settings.generate)
    chex.assert_trees_all_equal(drawn.params, run.generated.params[0])


@pytest.mark.slow
def test_every_source_city_is_left_out_in_turn_and_what_is_measured_is_kept(data_dir, tmp_path, monkeypatch):
    harvest = dataclasses.replace(tiny_settings(data_dir).harvest, steps=40, evaluate_every=20, learning_rate=3e-3)
    run = Run.open(tmp_path / "run", tiny_settings(data_dir, harvest=harvest))
    content = run.measure_rooms()
    assert [one["city"] for one in content["cities"]] == ["crowd_0", "crowd_1"]
    # The generator of a room never saw its city.
    for name, other in (("crowd_0", "crowd_1"), ("crowd_1", "crowd_0")):
        held = Hypernetwork.load(tmp_path / "run" / "room" / name / "hypernetwork")
        zoo = load_zoo(tmp_path / "run" / "room" / name / "zoo" / "zoo")
        assert {region.split("/")[0] for region in zoo.names} == {other}
        chex.assert_trees_all_close(held.pooled, zoo.pooled)
    table = room_table(content).splitlines()
    assert [line.split()[0] for line in table if line.startswith("crowd")] == ["crowd_0", "crowd_1"]
    with_room = [one for one in content["cities"] if one["room"] > 0.01]
    share = content["mean_share"]["generated"]
    assert share is None or share == pytest.approx(np.mean([one["share"]["generated"] for one in with_room]))
    assert f"mean of {len(with_room)}" in table[-2] or not with_room
    monkeypatch.setattr("gpdiff_jax.run.room.pretrain", None)
    assert run.measure_rooms() == content == json.loads((tmp_path / "run" / "room.json").read_text())
    # Of a single source city, none can be left out.
    run.source_cities = run.source_cities[:1]
    with pytest.raises(InputError, match="the run has the source city 'crowd_0' alone"):
        run.measure_rooms()


@pytest.mark.slow
def test_prompts_of_all_parts_are_kept_with_the_generator(data_dir, tmp_path):
    prompts = PromptConfig(
        parts=("statistics", "temporal", "spatial"),
        temporal=TemporalConfig(width=8, heads=2, encoder_layers=1, steps=4, batch=4, contrast_pairs=4, evaluations=2),
        embedding=EmbeddingConfig(width=6, relation_width=3, epochs=3),
    )
    settings = tiny_settings(data_dir, prompts=prompts)
    run = Run.open(tmp_path / "run", settings)
    made = run.generated.params[0]
    again = Run.open(tmp_path / "run", settings)
    np.testing.assert_array_equal(again.prompted.prompts.values, run.prompted.prompts.values)
    # A city that comes later needs the generator and its own file, nothing else.
    loaded = Hypernetwork.load(tmp_path / "run" / "hypernetwork")
    prompts = loaded.prompts(load_city(data_dir / "crowd_2.npz"))
    np.testing.assert_array_equal(prompts.values, run.target_prompts[0].values)
    key = jax.random.fold_in(run.key("generate"), 1)
    jax.tree.map(
        np.testing.assert_array_equal, loaded.generate(prompts, key=key, config=settings.generate).params, made
    )
    inspect_prompts.show(again)
    content = json.loads((tmp_path / "run" / "prompts.json").read_text())
    assert {region["city"] for region in content["regions"]} == {"crowd_0", "crowd_1", "crowd_2"}
    rows = content["prediction"]["predicted"]
    assert {row["predictor"] for row in rows} >= {"statistics", "temporal", "spatial", "all", "own_parameters"}
    own = [row["mae"] for row in rows if row["predictor"] == "own_parameters"]
    held = [again.zoo.validation_mae[again.zoo.city_index == city, 0].mean() for city in range(2)]
    np.testing.assert_allclose(own, held, rtol=1e-4)
    assert (tmp_path / "run" / "prompts.html").read_text().count("<h2>") == 4


def test_a_finished_run_shows_its_prompts(finished, data_dir, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / "run")
    inspect_prompts.show(Run.open(tmp_path / "run", tiny_settings(data_dir)))
    content = json.loads((tmp_path / "run" / "prompts.json").read_text())
    assert len(content["regions"]) == 24 and len(content["prediction"]["predicted"]) == 2 * 5
    assert len(content["neighbours"]) == 6 and str(tmp_path / "run" / "prompts.html") in capsys.readouterr().out


def _transfer(*words: str, cwd: pathlib.Path, elsewhere: bool = False) -> subprocess.CompletedProcess[str]:
    if not elsewhere:
        return run_here(run_main(show), *words, cwd=cwd)
    return subprocess.run(
        [sys.executable, "-m", "experiments.transfer", *words],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(_ROOT), "LC_ALL": "C.UTF-8"},
        check=False,
    )


@pytest.fixture(scope="module", name="mistakes")
def _mistakes(tmp_path_factory, data_dir: pathlib.Path, finished) -> pathlib.Path:
    """A working folder with everything that the mistaken command lines name."""
    folder = tmp_path_factory.mktemp("mistakes")
    shutil.copytree(data_dir, folder / "cities")
    whole = (folder / "cities" / "crowd_0.npz").read_bytes()
    (folder / "cities" / "cut.npz").write_bytes(whole[: len(whole) // 2])
    shutil.copyfile(folder / "cities" / "crowd_2.npz", folder / "cities" / "copy.npz")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.tex").write_text("mine")
    (folder / "file").write_text("a file")
    shutil.copytree(finished[0], folder / "other")
    return folder


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--data_dir=nowhere"], "nowhere"),
        (["--target=atlantis"], "'atlantis'.*crowd_0"),
        (["--target=crowd_0"], "target 'crowd_0' is also a source"),
        (["--support_days=12"], r"`support_days` \(=12\) is longer than the 9.8 days .* use at most 9"),
        (["--interval_minutes=7"], r"`interval_minutes` \(=7\)"),
        (["--interval_minutes=90"], r"`interval_minutes` \(=90\) must be a multiple of the 60 minutes"),
        (["--out_dir=foreign"], "'foreign' holds 'thesis.tex' but no run"),
        (["--out_dir=file/run"], "folder 'file/run' cannot be written"),
        (["--out_dir=other"], "'other' holds a run with other settings"),
        (["--history=3", "--model=stgcn"], "history of at least 7 steps, got 3"),
        (["--guidance=11"], "--guidance=11"),
        (
            ["--methods=default,zoo_men_few_shot"],
            "`methods` names 'zoo_men_few_shot', .* zoo_mean_few_shot",
        ),
        (["--sources=crowd_0,cut"], "cut.npz"),
        (["--sources=crowd_0,crowd_0"], "`sources` names 'crowd_0' twice"),
        (["--sources=crowd_0,copy"], "source 'copy' holds readings of the target 'crowd_2': its region 'r.' from 2024"),
        (["--channels=riders"], r"`channels` \(=riders\)|`channels` \(='riders'\)"),
    ],
    ids=lambda value: value[0].removeprefix("--") if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(mistakes, words, expected):
    usual = ["--data_dir=cities", "--sources=crowd_0,crowd_1", "--target=crowd_2", "--preset=tiny", "--out_dir=run"]
    # One of them in a process of its own, as a shell would start it.
    result = _transfer(*usual, *words, cwd=mistakes, elsewhere=words == ["--target=atlantis"])
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert re.search(expected, result.stderr), result.stderr
    # Nothing was begun that would stand in the way of a second try.
    assert not (mistakes / "run").exists()
