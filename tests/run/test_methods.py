"""In: tiny runs that are asked for other methods. Out: each method's forecasts, made once, with what they took."""

import dataclasses
import json
import shutil
import zipfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpdiff_jax import Run
from gpdiff_jax.cities import load_city, save_city
from gpdiff_jax.errors import InputError
from gpdiff_jax.run import methods
from gpdiff_jax.run.settings import DEFAULT_METHODS, METHODS, choose_methods
from gpdiff_jax.run.stages import generate_key
from gpdiff_jax.training.progress import read_log
from gpdiff_jax.training.storage import load_arrays
from tests.runs import tiny_settings, without_seconds


def test_a_finished_run_that_is_asked_for_more_methods_makes_only_those(finished, data_dir, tmp_path, monkeypatch):
    folder, content = finished
    shutil.copytree(folder, tmp_path / "run")
    made = []
    monkeypatch.setattr("gpdiff_jax.run.methods._make_forecast", _watched(made))
    every = tiny_settings(data_dir, methods=METHODS)
    more = Run.open(tmp_path / "run", every).evaluate()
    assert sorted(made) == sorted(set(METHODS) - set(DEFAULT_METHODS)) and tuple(more["methods"]) == METHODS
    assert {name: more["methods"][name] for name in DEFAULT_METHODS} == content["methods"]
    assert (tmp_path / "run" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    nulls = ("zoo_mean", "nearest_prompt", "nearest_plus_noise", "kernel_average", "ridge_plus_noise")
    for null in (*nulls, "mlp_hypernetwork", "mlp_ensemble"):
        zero, few = more["methods"][f"{null}_zero_shot"], more["methods"][f"{null}_few_shot"]
        assert np.isfinite([*zero["mae"], *few["mae"]]).all() and zero["steps"] is None and few["steps"] is not None
        assert zero["mae"] != more["methods"]["pooled_zero_shot"]["mae"], null
        assert f"{null}_few_shot" in (tmp_path / "run" / "report.html").read_text()
    learned, pooled = more["methods"]["meta_learned_few_shot"], more["methods"]["pooled_few_shot"]
    assert np.isfinite(learned["mae"]).all() and learned["mae"] != pooled["mae"] and learned["steps"] == 5
    assert learned["training_seconds"] > 0 and (tmp_path / "run" / "meta_learned").is_dir()
    for null in ("nearest_plus_noise", "ridge_plus_noise", "mlp_ensemble"):
        with np.load(tmp_path / "run" / "methods" / f"{null}_zero_shot_0.npz") as held:
            assert held["spread"].max() > 0, null
    # The ensemble has as many networks as GPDiff has samples, the first of which stands alone too.
    members = sorted(path.name for path in (tmp_path / "run").glob("mlp_hypernetwork*"))
    assert members == ["mlp_hypernetwork", "mlp_hypernetwork_1"]
    ensemble, alone = more["methods"]["mlp_ensemble_zero_shot"], more["methods"]["mlp_hypernetwork_zero_shot"]
    assert ensemble["training_seconds"] > alone["training_seconds"]
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert [line["step"] for line in log if line["stage"] == "mlp"] == [2, 4]
    # Asked for less, it still shows what it holds, and the network that was trained is read back.
    (tmp_path / "run" / "methods" / "mlp_hypernetwork_zero_shot_0.npz").unlink()
    monkeypatch.setattr("gpdiff_jax.run.stages.mlp_hypernetwork", None)
    fewer = tiny_settings(data_dir, methods=("mlp_hypernetwork_zero_shot",))
    again = Run.open(tmp_path / "run", fewer).evaluate()
    assert without_seconds(again) == without_seconds(more)


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
    rules = tiny_settings(data_dir, methods=("last_value", "historical_average"))
    few = Run.open(tmp_path / "run", rules).evaluate()
    assert list(few["methods"]) == ["historical_average", "last_value"]
    assert few["methods"]["last_value"]["mae"] == content["methods"]["last_value"]["mae"]
    with np.load(tmp_path / "run" / "forecasts.npz") as held:
        assert set(held.files) == {"window_start", "node_ids", "truth", "protocol", "unit", "horizon_minutes"}
    assert "GPDiff has no result" in (tmp_path / "run" / "report.html").read_text()


def test_rules_that_train_nothing_train_nothing(data_dir, tmp_path, capsys):
    folder = tmp_path / "run"
    content = Run.open(folder, tiny_settings(data_dir, methods=("last_value", "historical_average"))).evaluate()
    assert list(content["methods"]) == ["historical_average", "last_value"]
    assert all(entry["training_seconds"] == 0 for entry in content["methods"].values())
    made = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert made == {
        *("config.json", "methods", "metrics.json", "regions.csv", "forecasts.npz", "report.npz", "report.html"),
    }
    assert "nothing was generated in this run" in (folder / "report.html").read_text()
    # A null hypothesis needs the zoo, and no generator.
    Run.open(folder, tiny_settings(data_dir, methods=("zoo_mean_zero_shot",))).evaluate()
    assert (folder / "zoo").is_dir() and not (folder / "hypernetwork").exists()


def test_nulls_are_shrunk_as_the_generator_but_for_those_that_choose_by_cities(finished, data_dir, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    run, leaves = Run.open(tmp_path / "run", tiny_settings(data_dir)), {}
    families = ("zoo_mean", "nearest_prompt", "gaussian_codes", "kernel_average", "ridge_hypernetwork")
    for kept in (1.0, 0.25):
        run.settings = dataclasses.replace(
            run.settings, generate=dataclasses.replace(run.settings.generate, shrinkage=kept)
        )
        for family in families:
            params = methods._make_starts(run, 0, family, False)[0]
            apart = jax.tree.map(lambda leaf, pooled: np.asarray(leaf) - np.asarray(pooled), params, run.pooled)
            leaves[family, kept] = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(apart)])
    for family in families:
        share = 1.0 if family in ("kernel_average", "ridge_hypernetwork") else 0.25
        assert np.abs(leaves[family, 1.0]).max() > 1e-4
        np.testing.assert_allclose(leaves[family, 0.25], share * leaves[family, 1.0], atol=1e-6)
    # If nothing is said, as much is kept of them as of a generated difference, by the covariates.
    for covariates, share in (("profile", 0.5), ("calendar", 1.0)):
        run.settings = dataclasses.replace(
            run.settings,
            data=dataclasses.replace(run.settings.data, covariates=covariates),
            generate=dataclasses.replace(run.settings.generate, shrinkage=None),
        )
        params = methods._make_starts(run, 0, "zoo_mean", False)[0]
        apart = jax.tree.map(lambda leaf, pooled: np.asarray(leaf) - np.asarray(pooled), params, run.pooled)
        made = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(apart)])
        np.testing.assert_allclose(made, share * leaves["zoo_mean", 1.0], atol=1e-6)


def test_seconds_hold_what_a_method_needs_and_training_is_told_apart(finished):
    folder, content = finished
    stages = json.loads((folder / "seconds.json").read_text())
    trained = {"residual_autoregression", "boosted_trees", "pooled", "harvest", "pretrain", "generate"}
    assert set(stages) == trained and min(stages.values()) > 0
    training = {name: entry["training_seconds"] for name, entry in content["methods"].items()}
    assert training["last_value"] == training["target_only"] == 0
    assert training["pooled_zero_shot"] == stages["pooled"]
    assert training["ridge_hypernetwork_few_shot"] == pytest.approx(stages["pooled"] + stages["harvest"])
    assert training["gpdiff_zero_shot"] == pytest.approx(stages["pooled"] + stages["harvest"] + stages["pretrain"])
    generating = load_arrays(folder / "generated", 3, "generated parameters")[1]["seconds"]["0"]
    assert content["methods"]["gpdiff_zero_shot"]["seconds"] > generating > 0


def test_what_is_chosen_on_the_validation_day_starts_from_prompts_that_do_not_know_it(
    finished, data_dir, tmp_path, monkeypatch
):
    shutil.copytree(finished[0], tmp_path / "run")
    for name in ("generated", "generated_for_choice"):
        shutil.rmtree(tmp_path / "run" / name, ignore_errors=True)
    run, starts = Run.open(tmp_path / "run", tiny_settings(data_dir)), {}
    # A generator of four steps hardly knows of prompts: one of moved weights does.
    moved = jax.tree.map(
        lambda leaf: leaf + 0.1 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape), run.hypernetwork.variables
    )
    run.hypernetwork = dataclasses.replace(run.hypernetwork, variables=moved)
    own = dataclasses.replace(run.settings.adapt, update="own")
    run.settings = dataclasses.replace(run.settings, adapt=own)

    def watched(model, target, params, config, **options):
        starts[method] = (params, options["choice_params"])
        return original(model, target, params, config, **options)

    original = methods.few_shot
    monkeypatch.setattr(methods, "few_shot", watched)
    for method in ("gpdiff_few_shot", "ridge_hypernetwork_few_shot", "pooled_few_shot", "target_only"):
        methods._make_forecast(run, 0, method)
    assert starts["pooled_few_shot"][1] is starts["target_only"][1] is None
    (adaptation,), (support,) = run.choice_prompts, run.target_prompts
    assert adaptation is not None and adaptation.provenance != support.provenance
    assert f"steps {run.targets[0].split.adaptation.start} to {run.targets[0].split.adaptation.stop}" in str(adaptation)
    for method in ("gpdiff_few_shot", "ridge_hypernetwork_few_shot"):
        params, choice = starts[method]
        assert jax.tree.all(jax.tree.map(lambda a, b: (np.asarray(a) != np.asarray(b)).any(), params, choice))
    key = generate_key(run, 0)
    drawn = run.hypernetwork.generate(adaptation, key=key, config=run.settings.generate).params
    chex.assert_trees_all_equal(drawn, starts["gpdiff_few_shot"][1])


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "of another shape", "of two clocks"])
def test_a_damaged_forecast_is_named_and_made_again(finished, data_dir, tmp_path, capsys, damage):
    folder, content = finished
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run" / "methods" / "last_value_0.npz"
    whole = bytearray(path.read_bytes())
    if damage == "foreign":
        np.savez(path, other=np.zeros(3))
    elif damage.startswith("of"):
        with np.load(path) as held:
            arrays = dict(held)
        shape = damage == "of another shape"
        changed = {"forecast": arrays["forecast"][:, :, :1]} if shape else {"seconds": np.zeros(2)}
        np.savez(path, allow_pickle=False, **(arrays | changed))
    else:
        whole[len(whole) // 3] ^= 0xFF
        path.write_bytes(whole[:200] if damage == "cut" else whole)
    capsys.readouterr()
    again = Run.open(tmp_path / "run", tiny_settings(data_dir)).evaluate()
    assert without_seconds(again) == without_seconds(content)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert "last_value_0.npz' is damaged (" in line and line.endswith("; it is made again where it is asked for")


@pytest.mark.parametrize("of", ["another method", "another run", "an earlier version"])
def test_forecasts_under_a_name_that_is_not_theirs_are_not_taken(finished, data_dir, tmp_path, capsys, of):
    folder, content = finished
    shutil.copytree(folder, tmp_path / "run")
    methods_of = tmp_path / "run" / "methods"
    path, other = methods_of / "last_value_0.npz", methods_of / "historical_average_0.npz"
    settings = tiny_settings(data_dir, methods=("last_value",))
    if of == "another method":
        shutil.copy(other, path)
        shutil.copy(methods_of / "pooled_zero_shot_0.npz", other)
    elif of == "another run":
        data = dataclasses.replace(settings.data, support_days=settings.data.support_days + 1)
        Run.open(tmp_path / "other", dataclasses.replace(settings, data=data)).evaluate()
        shutil.copy(tmp_path / "other" / "methods" / path.name, path)
    else:
        with np.load(path) as held:
            np.savez(path, **{name: held[name] for name in held.files if name != "made_of"})
    before = other.read_bytes()
    capsys.readouterr()
    again = Run.open(tmp_path / "run", settings).evaluate()
    assert without_seconds(again)["methods"]["last_value"] == without_seconds(content)["methods"]["last_value"]
    said = [line for line in capsys.readouterr().err.splitlines() if "not taken" in line]
    # What nobody asked for stays where it lies, and is no result of this run; of earlier versions all is taken.
    assert other.read_bytes() == before
    assert ("historical_average" in again["methods"]) == (of != "another method")
    assert bool(said) == (of != "an earlier version")
    assert all("_0.npz' holds forecasts of another method or another run, which are not taken" in line for line in said)


def test_a_forecast_that_cannot_be_read_for_now_is_not_called_damaged(finished, data_dir, tmp_path, monkeypatch):
    shutil.copytree(finished[0], tmp_path / "run")
    run = Run.open(tmp_path / "run", tiny_settings(data_dir))
    files = sorted((tmp_path / "run" / "methods").iterdir())
    for error in (MemoryError("no memory"), OSError(5, "Input/output error")):

        def load(*arguments, error=error, **options):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(zipfile, "ZipFile", load)
            with pytest.raises(type(error)):
                methods.held_methods(run)
        assert sorted((tmp_path / "run" / "methods").iterdir()) == files


def test_errors_of_channels_with_other_units_are_averaged_as_shares(data_dir, tmp_path):
    for name in ("crowd_0", "crowd_2"):
        city = load_city(data_dir / f"{name}.npz")
        values = np.concatenate([city.values, 100 * city.values], axis=2)
        save_city(tmp_path / f"{name}.npz", dataclasses.replace(city, values=values, feature_names=("people", "grams")))
    settings = tiny_settings(tmp_path, sources=("crowd_0",), channels="each", methods=("last_value",))
    content = Run.open(tmp_path / "run", settings).evaluate()
    people, grams = (content["channels"][name]["methods"]["last_value"] for name in ("people", "grams"))
    np.testing.assert_allclose(grams["mae"], 100 * np.asarray(people["mae"]), rtol=1e-4)
    assert content["channels"]["people"]["unit"] == "people per 60 min"
    assert content["unit"] == "share of the channel's mean reading"
    truth = np.load(tmp_path / "run" / "forecasts.npz")["truth"][:, :8]
    expected = np.asarray(people["mae"]) / np.nanmean(np.abs(truth))
    np.testing.assert_allclose(content["methods"]["last_value"]["mae"], expected, rtol=1e-4)


def test_methods_are_chosen_by_name_or_by_set():
    assert choose_methods(["default"]) == DEFAULT_METHODS and choose_methods(["all"]) == METHODS
    chosen = choose_methods(["zoo_mean_few_shot", "last_value", "last_value"])
    assert chosen == ("last_value", "zoo_mean_few_shot")
    assert choose_methods(["default", "zoo_mean_few_shot"]) == (*DEFAULT_METHODS, "zoo_mean_few_shot")
    with pytest.raises(InputError, match="`methods` is empty; name default"):
        choose_methods([])
    with pytest.raises(InputError, match="`methods` names 'magic', which is no method; use default, all, or some of"):
        choose_methods(["magic"])
