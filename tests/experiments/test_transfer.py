"""In: tiny runs of the main job on simulated cities, whole, repeated, killed, and mistaken.
Out: every file that was promised, the same numbers however a run got there, and one line for every mistake.
"""

import csv
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import inspect_prompts, methods
from experiments.diagnose import measure
from experiments.results import evaluate, results_table
from experiments.settings import DEFAULT_METHODS, METHODS, Settings, choose_methods, settings_from_flags
from experiments.stages import Run, generate_key, open_run, stage_main
from experiments.transfer import show
from gpdiff_jax.adapt import AdaptConfig
from gpdiff_jax.base import BaseConfig
from gpdiff_jax.checkpoint import load_arrays
from gpdiff_jax.cities import City, load_city, save_city
from gpdiff_jax.codec import CodecConfig
from gpdiff_jax.diagnostics import DiagnosticsConfig
from gpdiff_jax.diffusion.denoiser import DenoiserConfig
from gpdiff_jax.diffusion.training import PretrainConfig
from gpdiff_jax.errors import InputError
from gpdiff_jax.hypernetwork import GenerateConfig, Hypernetwork
from gpdiff_jax.models import protocol
from gpdiff_jax.progress import read_log
from gpdiff_jax.prompts.autoencoder import TemporalConfig
from gpdiff_jax.prompts.embedding_training import EmbeddingConfig
from gpdiff_jax.prompts.encoders import PromptConfig
from gpdiff_jax.region_training import HarvestConfig
from gpdiff_jax.sources import DataConfig
from tests.commands import run_here

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_GPDIFF = ("gpdiff_zero_shot", "gpdiff_few_shot")


@pytest.fixture(scope="module", name="data_dir")
def _data_dir(tmp_path_factory, simulated_cities: list[City]) -> pathlib.Path:
    """Files of three cities; the target has a region that shows nothing in the support days."""
    folder = tmp_path_factory.mktemp("cities")
    for city in simulated_cities:
        values = np.array(city.values)
        if city is simulated_cities[-1]:
            values[163:235, 5] = np.nan
        save_city(folder / f"{city.name}.npz", dataclasses.replace(city, values=values))
    return folder


def _settings(data_dir: pathlib.Path, **change) -> Settings:
    """What `--preset tiny` stands for, cut further."""
    settings = Settings(
        data_dir=str(data_dir),
        sources=("crowd_0", "crowd_1"),
        target="crowd_2",
        interval_minutes=60,
        channels="first",
        model="tiny",
        model_file_sha256=None,
        seed=0,
        simulation=None,
        data=DataConfig(variants=3, max_neighbours=3),
        prompts=PromptConfig(),
        base=BaseConfig(steps=20, regions=4, windows=4, evaluations=2),
        harvest=HarvestConfig(steps=8, windows=4, evaluate_every=4, snapshots=2, anchor_windows=0),
        pretrain=PretrainConfig(
            denoiser=DenoiserConfig(width=16, layers=1, heads=2, prompt_bottleneck=8),
            codec=CodecConfig(components=8),
            steps=4,
            batch=4,
            windows=2,
            evaluations=2,
        ),
        generate=GenerateConfig(samples=2, steps=3),
        adapt=AdaptConfig(learning_rates=(1e-3,), steps=4, evaluate_every=2, batch=16),
        target_only=AdaptConfig(learning_rates=(3e-3,), steps=4, evaluate_every=2, batch=16),
    )
    return dataclasses.replace(settings, **change)


@pytest.fixture(scope="module", name="finished")
def _finished(data_dir: pathlib.Path, tmp_path_factory) -> tuple[pathlib.Path, dict]:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, evaluate(open_run(_settings(data_dir), str(folder)))


def _without_seconds(content: dict) -> dict:
    methods = {
        name: {key: value for key, value in entry.items() if not key.endswith("seconds")}
        for name, entry in content["methods"].items()
    }
    return content | {"methods": methods}


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
        tuned = name == "target_only" or name.endswith("few_shot")
        assert (entry["steps"] is not None) == (entry["validation_mae"] is not None) == tuned, name


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
    assert {line["stage"] for line in log} == {"base", "harvest", "pretrain", "generate", "adapt"}
    steps = [line["step"] for line in log if line["stage"] == "base"]
    assert steps == [10, 20] and all("train_loss" in line for line in log if line["stage"] == "base")
    page = (folder / "report.html").read_text()
    assert "<html" in page and "crowd_2" in page and "gpdiff_few_shot" in page.replace(" ", "_").lower()
    with np.load(folder / "report.npz", allow_pickle=False) as held:
        assert held["zoo_projection"].shape == (16, 2) and held["generated_projection"].shape == (16, 2)
        assert set(held["zoo_city"].tolist()) == {"crowd_0", "crowd_1"} and held["latitude"].shape == (8,)
        assert all(np.isfinite(held[name]).all() for name in held.files if held[name].dtype.kind == "f")


def test_the_table_ranks_all_methods(finished):
    _, content = finished
    lines = results_table(content).splitlines()[1:]
    assert sorted(line.split()[0] for line in lines) == sorted(DEFAULT_METHODS)
    errors = [content["methods"][line.split()[0]]["mae_mean"] for line in lines]
    assert errors == sorted(errors)


def test_a_finished_run_is_read_back_without_training(finished, data_dir, monkeypatch):
    folder, content = finished

    def refuse(*arguments, **options):
        raise AssertionError("a finished stage ran again")

    for name in ("stages.train_base", "stages.harvest_zoo", "stages.pretrain", "methods.zero_shot", "methods.few_shot"):
        monkeypatch.setattr(f"experiments.{name}", refuse)
    assert evaluate(open_run(_settings(data_dir), str(folder))) == content


def test_a_finished_run_that_is_asked_for_more_methods_makes_only_those(finished, data_dir, tmp_path, monkeypatch):
    folder, content = finished
    shutil.copytree(folder, tmp_path / "run")
    made = []
    monkeypatch.setattr("experiments.methods._make_forecast", _watched(made))
    asked = _settings(data_dir, methods=METHODS)
    more = evaluate(open_run(asked, str(tmp_path / "run")))
    assert sorted(made) == sorted(set(METHODS) - set(DEFAULT_METHODS)) and tuple(more["methods"]) == METHODS
    assert {name: more["methods"][name] for name in DEFAULT_METHODS} == content["methods"]
    assert (tmp_path / "run" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    for null in ("zoo_mean", "nearest_prompt", "nearest_plus_noise", "kernel_average", "mlp_hypernetwork"):
        zero, few = more["methods"][f"{null}_zero_shot"], more["methods"][f"{null}_few_shot"]
        assert np.isfinite([*zero["mae"], *few["mae"]]).all() and zero["steps"] is None and few["steps"] is not None
        assert zero["mae"] != more["methods"]["pooled_zero_shot"]["mae"], null
        assert f"{null}_few_shot" in (tmp_path / "run" / "report.html").read_text()
    with np.load(tmp_path / "run" / "methods" / "nearest_plus_noise_zero_shot_0.npz") as held:
        assert held["spread"].max() > 0
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert [line["step"] for line in log if line["stage"] == "mlp"] == [2, 4]
    # Asked for less, it still shows what it holds, and the network that was trained is read back.
    (tmp_path / "run" / "methods" / "mlp_hypernetwork_zero_shot_0.npz").unlink()
    monkeypatch.setattr("experiments.stages.mlp_hypernetwork", None)
    fewer = _settings(data_dir, methods=("mlp_hypernetwork_zero_shot",))
    again = evaluate(open_run(fewer, str(tmp_path / "run")))
    assert _without_seconds(again) == _without_seconds(more)


def _watched(made: list[str]):
    original = methods._make_forecast

    def make(run: Run, channel: int, method: str):
        made.append(method)
        return original(run, channel, method)

    return make


def test_a_run_without_gpdiff_among_its_methods_has_its_tables_and_its_page(finished, data_dir, tmp_path):
    folder, content = finished
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "methods")
    (tmp_path / "run" / "report.html").unlink()
    few = evaluate(open_run(_settings(data_dir, methods=("last_value", "historical_average")), str(tmp_path / "run")))
    assert list(few["methods"]) == ["historical_average", "last_value"]
    assert few["methods"]["last_value"]["mae"] == content["methods"]["last_value"]["mae"]
    with np.load(tmp_path / "run" / "forecasts.npz") as held:
        assert set(held.files) == {"window_start", "node_ids", "truth"}
    assert "GPDiff has no result" in (tmp_path / "run" / "report.html").read_text()


def test_rules_that_train_nothing_train_nothing(data_dir, tmp_path, capsys):
    folder = tmp_path / "run"
    content = evaluate(open_run(_settings(data_dir, methods=("last_value", "historical_average")), str(folder)))
    assert list(content["methods"]) == ["historical_average", "last_value"]
    assert all(entry["training_seconds"] == 0 for entry in content["methods"].values())
    made = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert made == {
        *("config.json", "methods", "metrics.json", "regions.csv", "forecasts.npz", "report.npz", "report.html"),
    }
    assert "nothing was generated in this run" in (folder / "report.html").read_text()
    # A null hypothesis needs the zoo, and no generator.
    evaluate(open_run(_settings(data_dir, methods=("zoo_mean_zero_shot",)), str(folder)))
    assert (folder / "zoo").is_dir() and not (folder / "hypernetwork").exists()


def test_seconds_hold_what_a_method_needs_and_training_is_told_apart(finished):
    folder, content = finished
    stages = json.loads((folder / "seconds.json").read_text())
    assert set(stages) == {"base", "harvest", "pretrain", "generate"} and min(stages.values()) > 0
    training = {name: entry["training_seconds"] for name, entry in content["methods"].items()}
    assert training["last_value"] == training["target_only"] == 0
    assert training["pooled_zero_shot"] == stages["base"]
    assert training["ridge_hypernetwork_few_shot"] == pytest.approx(stages["base"] + stages["harvest"])
    assert training["gpdiff_zero_shot"] == pytest.approx(stages["base"] + stages["harvest"] + stages["pretrain"])
    generating = load_arrays(folder / "generated", 1, "generated parameters")[1]["seconds"]["0"]
    assert content["methods"]["gpdiff_zero_shot"]["seconds"] > generating > 0


def test_what_is_chosen_on_the_validation_day_starts_from_prompts_that_do_not_know_it(finished, data_dir, monkeypatch):
    run, given = open_run(_settings(data_dir), str(finished[0])), {}

    def watched(model, target, params, config, **options):
        given[method] = (params, options["choice_params"])
        return original(model, target, params, config, **options)

    original = methods.few_shot
    monkeypatch.setattr(methods, "few_shot", watched)
    for method in ("gpdiff_few_shot", "ridge_hypernetwork_few_shot", "pooled_few_shot", "target_only"):
        methods._make_forecast(run, 0, method)
    assert given["pooled_few_shot"][1] is given["target_only"][1] is None
    (adaptation,), (support,) = run.choice_prompts, run.target_prompts
    assert adaptation is not None and adaptation.provenance != support.provenance
    assert f"steps {run.targets[0].split.adaptation.start} to {run.targets[0].split.adaptation.stop}" in str(adaptation)
    for method in ("gpdiff_few_shot", "ridge_hypernetwork_few_shot"):
        params, choice = given[method]
        assert jax.tree.all(jax.tree.map(lambda a, b: (np.asarray(a) != np.asarray(b)).any(), params, choice))
    key = generate_key(run, 0)
    drawn = run.hypernetwork.generate(adaptation, key=key, config=run.settings.generate).params
    jax.tree.map(np.testing.assert_array_equal, drawn, given["gpdiff_few_shot"][1])


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign"])
def test_a_damaged_forecast_is_named_and_made_again(finished, data_dir, tmp_path, capsys, damage):
    folder, content = finished
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run" / "methods" / "last_value_0.npz"
    whole = bytearray(path.read_bytes())
    if damage == "foreign":
        np.savez(path, other=np.zeros(3))
    else:
        whole[len(whole) // 3] ^= 0xFF
        path.write_bytes(whole[:200] if damage == "cut" else whole)
    with pytest.raises(InputError, match=r"methods/last_value_0.npz' is damaged"):
        methods.method_forecast(open_run(_settings(data_dir), str(tmp_path / "run")), 0, "last_value")
    capsys.readouterr()
    again = evaluate(open_run(_settings(data_dir), str(tmp_path / "run")))
    assert _without_seconds(again) == _without_seconds(content)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert "last_value_0.npz' is damaged (" in line and line.endswith("; it is made again")


def test_errors_of_channels_with_other_units_are_averaged_as_shares(data_dir, tmp_path):
    for name in ("crowd_0", "crowd_2"):
        city = load_city(data_dir / f"{name}.npz")
        values = np.concatenate([city.values, 100 * city.values], axis=2)
        save_city(tmp_path / f"{name}.npz", dataclasses.replace(city, values=values, feature_names=("people", "grams")))
    settings = _settings(tmp_path, sources=("crowd_0",), channels="each", methods=("last_value",))
    content = evaluate(open_run(settings, str(tmp_path / "run")))
    people, grams = (content["channels"][name]["methods"]["last_value"] for name in ("people", "grams"))
    np.testing.assert_allclose(grams["mae"], 100 * np.asarray(people["mae"]), rtol=1e-4)
    assert content["channels"]["people"]["unit"] == "people per 60 min"
    assert content["unit"] == "share of the channel's mean reading"
    truth = np.load(tmp_path / "run" / "forecasts.npz")["truth"][:, :8]
    expected = np.asarray(people["mae"]) / np.nanmean(np.abs(truth))
    np.testing.assert_allclose(content["methods"]["last_value"]["mae"], expected, rtol=1e-4)


@pytest.mark.slow
def test_a_run_is_diagnosed_and_the_page_says_what_each_number_means(finished, data_dir, tmp_path):
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "run")
    run = open_run(_settings(data_dir), str(tmp_path / "run"))
    config = DiagnosticsConfig(generate=run.settings.generate, shuffles=2, variants=2)
    content = measure(run, config)
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
    jax.tree.map(np.testing.assert_array_equal, drawn.params, run.generated.params[0])


def test_methods_are_chosen_by_name_or_by_set():
    assert choose_methods(["default"]) == DEFAULT_METHODS and choose_methods(["all"]) == METHODS
    chosen = choose_methods(["zoo_mean_few_shot", "last_value", "last_value"])
    assert chosen == ("last_value", "zoo_mean_few_shot")
    assert choose_methods(["default", "zoo_mean_few_shot"]) == (*DEFAULT_METHODS, "zoo_mean_few_shot")
    with pytest.raises(InputError, match="--methods is empty; name default"):
        choose_methods([])
    with pytest.raises(InputError, match="--methods names 'magic', which is no method; --help lists them"):
        choose_methods(["magic"])


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
    resumed = evaluate(open_run(_settings(data_dir), str(half)))
    assert _without_seconds(resumed) == _without_seconds(content)
    with np.load(half / "forecasts.npz") as now, np.load(folder / "forecasts.npz") as then:
        for name in then.files:
            np.testing.assert_array_equal(now[name], then[name])
    assert len(read_log(half / "log.jsonl")) >= len(read_log(folder / "log.jsonl"))


@pytest.mark.slow
def test_prompts_of_all_parts_are_kept_with_the_generator(data_dir, tmp_path):
    prompts = PromptConfig(
        parts=("statistics", "temporal", "spatial"),
        temporal=TemporalConfig(width=8, heads=2, encoder_layers=1, steps=4, batch=4, contrast_pairs=4, evaluations=2),
        embedding=EmbeddingConfig(width=6, relation_width=3, epochs=3),
    )
    settings = _settings(data_dir, prompts=prompts)
    run = open_run(settings, str(tmp_path / "run"))
    made = run.generated.params[0]
    again = open_run(settings, str(tmp_path / "run"))
    np.testing.assert_array_equal(again.prompted.prompts.values, run.prompted.prompts.values)
    # A city that comes later needs the generator and its own file, nothing else.
    loaded = Hypernetwork.load(tmp_path / "run" / "hypernetwork")
    told = loaded.prompts(load_city(data_dir / "crowd_2.npz"))
    np.testing.assert_array_equal(told.values, run.target_prompts[0].values)
    key = jax.random.fold_in(run.key("generate"), 1)
    jax.tree.map(np.testing.assert_array_equal, loaded.generate(told, key=key, config=settings.generate).params, made)
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
    inspect_prompts.show(open_run(_settings(data_dir), str(tmp_path / "run")))
    content = json.loads((tmp_path / "run" / "prompts.json").read_text())
    assert len(content["regions"]) == 24 and len(content["prediction"]["predicted"]) == 2 * 5
    assert len(content["neighbours"]) == 6 and str(tmp_path / "run" / "prompts.html") in capsys.readouterr().out


def test_a_stage_that_was_damaged_is_refused_by_name(finished, data_dir, tmp_path):
    folder, _ = finished
    half = tmp_path / "half"
    shutil.copytree(folder, half)
    for path in (half / "zoo").rglob("*"):
        if path.is_file():
            path.unlink()
    with pytest.raises(InputError, match=r"the zoo at .* cannot be read .*; delete it and make it again"):
        evaluate(open_run(_settings(data_dir), str(half)))


def test_a_run_is_not_continued_with_other_readings(finished, data_dir, tmp_path):
    folder, _ = finished
    other = tmp_path / "cities"
    shutil.copytree(data_dir, other)
    city = load_city(other / "crowd_1.npz")
    save_city(other / "crowd_1.npz", dataclasses.replace(city, values=city.values + np.float32(1)))
    shutil.copytree(folder, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    config["flags"]["data_dir"] = str(other)
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"holds a run with other settings .*crowd_1"):
        open_run(_settings(other), str(tmp_path / "run"))


def test_a_run_is_not_continued_with_another_model_file(finished, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "_REGISTRY", dict(protocol._REGISTRY))
    path = tmp_path / "own.py"
    path.write_text("import gpdiff_jax as gpd\ngpd.register_model('own', lambda sizes: None)\n")
    with flagsaver.flagsaver():
        flags.FLAGS(["run", f"--model={path}"])
        settings = settings_from_flags()
    assert settings.model == "own"
    assert settings.model_file_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    shutil.copytree(finished[0], tmp_path / "run")
    with pytest.raises(InputError, match=rf"model_file_sha256 None, now {settings.model_file_sha256}"):
        open_run(_settings(data_dir, model_file_sha256=settings.model_file_sha256), str(tmp_path / "run"))


def test_the_targets_readings_are_in_nothing_that_is_trained_before_it(finished, data_dir, tmp_path):
    """Another target, the same sources: what is harvested does not change, so its folder can be shared."""
    folder, _ = finished
    city = load_city(data_dir / "crowd_2.npz")
    other = tmp_path / "cities"
    shutil.copytree(data_dir, other)
    save_city(other / "crowd_2.npz", dataclasses.replace(city, values=city.values * np.float32(2) + np.float32(1)))
    runs = [Run(_settings(data_dir), folder, *_cities(data_dir)), Run(_settings(other), tmp_path, *_cities(other))]
    for name in ("bank", "graphs", "train", "validation_starts", "prompts"):
        one, two = (jax.tree.leaves(getattr(run.sources, name)) for run in runs)
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(a, b)
    assert str(runs[0].key("harvest")) == str(runs[1].key("harvest"))


def _cities(folder: pathlib.Path) -> tuple[list[City], list[City]]:
    cities = [load_city(folder / f"crowd_{k}.npz") for k in range(3)]
    return cities[:2], cities[2:]


def _transfer(*words: str, cwd: pathlib.Path, elsewhere: bool = False) -> subprocess.CompletedProcess[str]:
    if not elsewhere:
        return run_here(stage_main(show), *words, cwd=cwd)
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
        (["--target=crowd_0"], "--target 'crowd_0' is also a source"),
        (["--support_days=12"], r"`support_days` \(=12\) is longer than the 9.8 days .* use at most 9"),
        (["--interval_minutes=7"], r"`interval_minutes` \(=7\)"),
        (["--interval_minutes=90"], r"`interval_minutes` \(=90\) must be a multiple of the 60 minutes"),
        (["--out_dir=foreign"], "'foreign' holds 'thesis.tex' but no run"),
        (["--out_dir=file/run"], "--out_dir 'file/run' cannot be written"),
        (["--out_dir=other"], "'other' holds a run with other settings"),
        (["--history=3"], "history of at least 7 steps, got 3"),
        (["--guidance=11"], "--guidance=11"),
        (
            ["--methods=default,zoo_men_few_shot"],
            "--methods names 'zoo_men_few_shot', .* zoo_mean_few_shot",
        ),
        (["--sources=crowd_0,cut"], "cut.npz"),
        (["--sources=crowd_0,crowd_0"], "--sources names 'crowd_0' twice"),
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
