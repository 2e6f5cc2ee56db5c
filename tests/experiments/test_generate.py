"""In: a saved generator of a tiny model, and files of cities that it never saw.
Out: their parameters and forecasts, the same by hand, by the library and by the command; one line for every mistake.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver
from orbax.checkpoint import v1 as ocp

import gpdiff_jax as gpd
from experiments import generate
from experiments.generate import flags
from gpdiff_jax.diffusion.denoiser import make_denoiser
from gpdiff_jax.models import registry
from gpdiff_jax.prompts.prompt import PromptScaler
from gpdiff_jax.run import new_city
from gpdiff_jax.training.storage import load_arrays, save_arrays
from gpdiff_jax.zoo.codec import fit_codec
from gpdiff_jax.zoo.tokens import make_layout, to_tokens

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_DATA = gpd.DataConfig(covariates="none", variants=3, max_neighbours=2)
_CONFIG = gpd.GenerateConfig(samples=3, steps=2)
_HOW = ("--samples=3", "--sampler_steps=2", "--seed=7")
_MODEL = '''
"""The last reading, scaled and shifted: compiles in no time."""
import jax.numpy as jnp
import gpdiff_jax as gpd


def make_linear(sizes):
    def init(key, graph, history, covariates):
        return {"bias": jnp.zeros(sizes.horizon), "scale": jnp.ones((sizes.horizon, 1))}

    def apply(params, graph, history, covariates):
        return history[0, -1, 0] * params["scale"] + params["bias"][:, None]

    return gpd.Model("linear", init, apply)


gpd.register_model("linear", make_linear)
'''


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory, simulated_cities: list[gpd.City]):
    """Where a generator of random weights lies as `made`, with the file of its model and files of cities."""
    folder = tmp_path_factory.mktemp("new")
    (folder / "linear.py").write_text(_MODEL)
    city = simulated_cities[2]
    gpd.save_city(folder / "whole.npz", dataclasses.replace(city, values=city.values[:240]))
    gpd.save_city(folder / "short.npz", dataclasses.replace(city, values=city.values[:60]))
    gpd.save_city(folder / "coarse.npz", dataclasses.replace(city, interval_minutes=120))
    half = np.repeat(city.values[:240], 2, axis=0) / 2
    both = np.concatenate([half[:479] * 3, half[:479]], axis=2)  # the last hour is not whole
    names = ("exits_per_30min", "entries_per_30min")
    gpd.save_city(folder / "fine.npz", dataclasses.replace(city, values=both, interval_minutes=30, feature_names=names))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
        gpd.load_model_file(folder / "linear.py")
        _generator(city).save(folder / "made")
        yield folder


def _generator(city: gpd.City) -> gpd.Hypernetwork:
    pooled = {"bias": jnp.zeros(6), "scale": jnp.ones((6, 1))}
    layout, rng = make_layout(pooled, 4), np.random.default_rng(0)
    flat = np.asarray(to_tokens(layout, pooled))
    codec = fit_codec(layout, flat, flat + 0.3 * rng.normal(size=(16, *flat.shape)).astype(np.float32), np.ones(16), 0)
    prompts = gpd.target_prompts(city, support_days=3)
    config = gpd.DenoiserConfig(width=8, layers=1, heads=2, prompt_bottleneck=4)
    example = jnp.zeros(codec.mask().shape), jnp.zeros(()), prompts.values[0, 0], jnp.ones(())
    shapes = jax.eval_shape(make_denoiser(config, codec, prompts.spatial).init, jax.random.key(0), *example)["params"]
    return gpd.Hypernetwork(
        model_name="linear",
        sizes=gpd.ModelSizes(12, 6, 2, 0),
        data=_DATA,
        denoiser_config=config,
        variables=jax.tree.map(lambda leaf: (0.4 * rng.normal(size=leaf.shape)).astype(np.float32), shapes),
        codec=codec,
        prompt_scaler=PromptScaler(prompts.values[0].mean(axis=0), prompts.values[0].std(axis=0) + 0.1),
        prompt_names=prompts.names,
        prompt_spatial=prompts.spatial,
        interval_minutes=60,
    )


def _generate(folder: pathlib.Path, *words: str, city: str = "whole.npz", out: str = "out") -> dict[str, np.ndarray]:
    """Runs the command in this process; returns what forecast.npz holds."""
    with flagsaver.flagsaver():
        flags.FLAGS(["generate", f"--hypernetwork={folder / 'made'}", f"--city={folder / city}", *_HOW, *words])
        if not flags.FLAGS["out_dir"].present:
            flags.FLAGS(["generate", f"--out_dir={folder / out}"])
        generate.main([])
    with np.load(folder / out / "forecast.npz", allow_pickle=False) as held:
        return {name: held[name] for name in held.files}


def test_the_command_forecasts_a_new_city_from_its_end_with_nothing_but_the_folder_and_two_files(folder, tmp_path):
    alone = tmp_path / "moved"
    shutil.copytree(folder / "made", alone / "hypernetwork")
    words = ["--hypernetwork=hypernetwork", f"--city={folder / 'whole.npz'}", f"--model={folder / 'linear.py'}", *_HOW]
    result = subprocess.run(
        [sys.executable, "-m", "experiments.generate", *words],
        **{"capture_output": True, "text": True, "timeout": 120, "check": False, "cwd": alone},
        env={**os.environ, "PYTHONPATH": str(_ROOT), "LC_ALL": "C.UTF-8"},
    )
    assert (result.returncode, result.stderr) == (0, "")
    out = alone / "runs" / "whole"
    lines = result.stdout.splitlines()
    assert lines[0] == "whole: 8 regions, seen from 2024-01-14T00:00 to 2024-01-17T00:00"
    assert lines[1] == "visitors per 60 min, forecast from 2024-01-17T00:00"
    assert [line.split()[0] for line in lines[3:11]] == [f"r{k}" for k in range(8)] and lines[11:] == [str(out)]

    # The same by the library, bit for bit.
    city, hypernetwork = gpd.load_city(folder / "whole.npz"), gpd.Hypernetwork.load(alone / "hypernetwork")
    new = gpd.prepare_new_city(city, hypernetwork)
    parameters = hypernetwork.generate(new.prompts, key=jax.random.key(7), config=_CONFIG)
    made = gpd.forecast_new_city(parameters, new)
    with np.load(out / "forecast.npz", allow_pickle=False) as held:
        np.testing.assert_array_equal(held["forecast"], made.forecast)
        np.testing.assert_array_equal(held["spread"], made.spread)
        assert held["forecast"].shape == held["truth"].shape == (1, 8, 6) and np.isnan(held["truth"]).all()
        assert held["window_start"].tolist() == ["2024-01-17T00:00"] and held["node_ids"].tolist() == list(
            city.node_ids
        )
        assert held["horizon_minutes"].tolist() == [60, 120, 180, 240, 300, 360]
        assert str(held["unit"]) == "visitors per 60 min"
    kept = gpd.load_parameters(out / "parameters")
    assert kept[1:] == ("whole", city.feature_names[0], 60, city.node_ids)
    assert (kept.parameters.model, kept.parameters.data) == ("linear", _DATA)
    chex.assert_trees_all_equal(kept.parameters.params, parameters.params)
    np.testing.assert_array_equal(gpd.forecast_new_city(kept.parameters, new).forecast, made.forecast)

    # The same by hand: the last reading, scaled by the last three days, and no count below zero.
    days, params = city.values[168:, :, 0].astype(np.float64), jax.tree.map(np.asarray, parameters.params)
    mean, std = np.nanmean(days, axis=0), np.nanstd(days, axis=0)
    last = np.nan_to_num((days[-1] - mean) / std)
    scaled = last[:, None] * params["scale"][..., 0] + params["bias"]
    drawn = np.maximum(scaled * std[:, None] + mean[:, None], 0.0)
    np.testing.assert_allclose(made.forecast[0], drawn.mean(axis=0), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(made.spread[0], drawn.std(axis=0), rtol=1e-3, atol=1e-3)
    summary = json.loads((out / "generate.json").read_text())
    assert summary["support"] == ["2024-01-14T00:00", "2024-01-17T00:00"] and summary["support_days"] == 3
    kept = _CONFIG.kept(hypernetwork.data.covariates)
    assert summary["generate"] == dataclasses.asdict(_CONFIG) | {"shrinkage": kept} and summary["mae"] is None
    assert summary["generator"] == json.loads(hypernetwork.summary())
    np.testing.assert_allclose(summary["forecast_mean"], drawn.mean(axis=(0, 1)), rtol=1e-4)


def test_rolling_days_that_are_the_protocols_test_span_are_forecast_as_the_library_does(folder, capsys):
    # 30 % of ten days are the last three.
    arrays = _generate(folder, "--rolling_days=3")
    city, hypernetwork = gpd.load_city(folder / "whole.npz"), gpd.Hypernetwork.load(folder / "made")
    parameters = hypernetwork.generate(hypernetwork.prompts(city), key=jax.random.key(7), config=_CONFIG)
    np.testing.assert_array_equal(arrays["forecast"], gpd.forecast(parameters, city))
    assert arrays["forecast"].shape == (67, 8, 6)
    steps = 168 + np.arange(67)[:, None] + np.arange(6)
    np.testing.assert_array_equal(arrays["truth"], city.values[steps, :, 0].transpose(0, 2, 1))
    summary = json.loads((folder / "out" / "generate.json").read_text())
    error = np.nanmean(np.abs(arrays["forecast"] - arrays["truth"]), axis=(0, 1))
    np.testing.assert_allclose(summary["mae"], error, rtol=1e-5)
    printed = capsys.readouterr().out.split("mean absolute error")[1].split()
    np.testing.assert_allclose([float(word) for word in printed[: len(error)]], error, rtol=1e-2)
    # What is read later changes nothing that was forecast before.
    values = np.array(city.values)
    values[200:] *= 2
    (folder / "later").mkdir()
    gpd.save_city(folder / "later" / "whole.npz", dataclasses.replace(city, values=values))
    later = _generate(folder, "--rolling_days=3", city="later/whole.npz")
    np.testing.assert_array_equal(later["forecast"][:33], arrays["forecast"][:33])
    assert (later["forecast"][33:] != arrays["forecast"][33:]).any(axis=(1, 2)).all()


def test_other_intervals_and_channels_come_to_the_generators_interval(folder):
    fine = _generate(folder, "--channels=entries_per_30min", city="fine.npz")
    # The last of 240 hours is only half there and does not count; regions are prompts apart by the city's name.
    city = gpd.load_city(folder / "whole.npz")
    assert fine["window_start"].tolist() == ["2024-01-16T23:00"]
    assert str(fine["unit"]) == "entries per 60 min"
    shorter = dataclasses.replace(city, name="fine", values=city.values[:239])
    hypernetwork = gpd.Hypernetwork.load(folder / "made")
    new = gpd.prepare_new_city(shorter, hypernetwork)
    parameters = hypernetwork.generate(new.prompts, key=jax.random.key(7), config=_CONFIG)
    np.testing.assert_allclose(fine["forecast"], gpd.forecast_new_city(parameters, new).forecast, rtol=1e-4)


def test_the_support_begins_where_something_was_read(folder):
    city, hypernetwork = gpd.load_city(folder / "whole.npz"), gpd.Hypernetwork.load(folder / "made")
    late = dataclasses.replace(city, values=city.values[10:72], start=city.start + np.timedelta64(10, "h"))
    new = gpd.prepare_new_city(late, hypernetwork)
    assert new.data.support_days == 3 and new.read.start == city.start
    assert new.support == ("2024-01-07T10:00", "2024-01-10T00:00")


def test_days_before_the_support_are_not_looked_at_unless_more_are_asked_for(folder):
    city, hypernetwork = gpd.load_city(folder / "whole.npz"), gpd.Hypernetwork.load(folder / "made")
    values = np.array(city.values)
    values[:168] *= 2
    other = dataclasses.replace(city, values=values)
    for days, same in ((None, True), (3, True), (4, False)):
        one, two = (gpd.prepare_new_city(c, hypernetwork, support_days=days) for c in (city, other))
        assert one.data.support_days == (days or 3) and len(one.target.split.support) == 24 * (days or 3)
        for name in ("mean", "std"):
            assert np.array_equal(getattr(one.target.bank, name), getattr(two.target.bank, name)) == same
        assert np.array_equal(one.prompts.values, two.prompts.values) == same


def test_what_is_odd_of_the_last_days_is_said(folder, capsys):
    city = gpd.load_city(folder / "whole.npz")
    values = np.array(city.values)
    values[168:, 2] = 0
    values[210:, 4] = np.nan
    # Until 18 h of the last day as on every other; and at night as in every other.
    values[168:, [1, 3]] = 7
    values[234:, 3] = 0
    values[np.arange(168, 240).reshape(3, 24)[:, 18:], 1] = 0
    gpd.save_city(folder / "odd.npz", dataclasses.replace(city, values=values))
    _generate(folder, "--samples=1", city="odd.npz", out="odd")
    assert capsys.readouterr().err.splitlines() == [
        "region 'r2' read nothing but 0; if it was out of order, leave it out",
        "region 'r4' was last read 30 hours before now",
        "region 'r3' reads 0 since 2024-01-16T18:00, where it never did at these hours; if it is out of order, leave "
        "these readings out",
    ]
    # Where 20 readings were to be expected: of two an hour, a few zeros may be chance.
    for usual, hours, said in ((7, 2, False), (7, 3, True), (2, 9, False), (2, 10, True), (2, 30, True)):
        values[168:, 3] = usual
        values[240 - hours :, 3] = 0
        rows = new_city._steps_of_odd_zeros(values[168:, :, 0], 24)
        assert rows[3] == hours * said and not rows[1]
    # From the first zero on, whatever was not read before it.
    values[168:, 3], values[200:220, 3], values[220:, 3] = 7, np.nan, 0
    assert new_city._steps_of_odd_zeros(values[168:, :, 0], 24)[3] == 20
    _generate(folder, "--samples=1", "--channels=entries_per_30min", city="fine.npz", out="half")
    late = "fine: what was read from 2024-01-16T23:00 on is not looked at, for these 60 minutes are not over"
    assert late in capsys.readouterr().err.splitlines()


def test_a_silent_region_and_an_unknown_calendar_are_forecast_too(folder, capsys):
    city = gpd.load_city(folder / "whole.npz")
    values = np.array(city.values)
    values[168:, 5] = np.nan
    gpd.save_city(folder / "silent.npz", dataclasses.replace(city, values=values, start=None))
    arrays = _generate(folder, "--samples=1", city="silent.npz", out="silent")
    assert arrays["window_start"].tolist() == ["step 240"] and "spread" not in arrays
    assert np.isfinite(arrays["forecast"]).all()
    printed = capsys.readouterr()
    assert printed.err == "region 'r5' has no visible reading; it takes its neighbours' statistics\n"
    assert "seen from step 168 to step 240" in printed.out and "±" not in printed.out
    summary = json.loads((folder / "silent" / "generate.json").read_text())
    assert summary["silent_regions"] == ["r5"] and summary["spread_mean"] is None


@pytest.fixture(scope="module", name="faulty")
def _faulty(folder) -> pathlib.Path:
    """The folder, with everything that the mistaken command lines name."""
    arrays, facts = load_arrays(folder / "made", _format(folder / "made"), "hypernetwork")
    save_arrays(
        folder / "undated", arrays, {name: value for name, value in facts.items() if name != "interval_minutes"}
    )
    save_arrays(folder / "newer", arrays, facts | {"format": 99})
    save_arrays(folder / "unknown", arrays, facts | {"model": "mine"})
    shutil.copytree(folder / "made", folder / "damaged")
    largest = max((p for p in (folder / "damaged").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.unlink()
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.tex").write_text("mine")
    (folder / "cut.npz").write_bytes((folder / "whole.npz").read_bytes()[:900])
    return folder


def _format(folder: pathlib.Path) -> int:
    return json.loads(ocp.metadata(folder).custom_metadata["facts"])["format"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--hypernetwork=nowhere"], "no hypernetwork at '.*nowhere'"),
        (["--hypernetwork=damaged"], "the hypernetwork at '.*damaged' is damaged"),
        (["--hypernetwork=newer"], "has format 99"),
        (["--hypernetwork=undated"], "does not say at which interval it was trained; pre-train it again"),
        (["--hypernetwork=unknown"], "model 'mine', which is not built in; name its file by --model FILE.py"),
        (["--model=stgcn"], "--model 'stgcn' is model 'stgcn', but 'made' generates 'linear'; leave it out"),
        (["--model=absent.py"], "no model file at '.*absent.py'"),
        (["--city=atlantis.npz"], "atlantis.npz: no such file"),
        (["--city=cut.npz"], "cut.npz: not a readable npz file"),
        (
            ["--city=short.npz", "--support_days=3"],
            r"\(=3\) is longer than the 2.5 days that city 'short' has before .*; use at most 2",
        ),
        (["--city=coarse.npz"], "city 'coarse' has a reading every 120 minutes, and the generator forecasts every 60;"),
        (["--channels=riders"], r"`channels` \(='riders'\) names none of city .*; choose from first, visitors"),
        (["--channels=each"], r"one channel at a time, and `channels` \(='each'\) names none .* first, visitors"),
        (["--support_days=11"], r"\(=11\) is longer than the 10.0 days .* use at most 10"),
        (
            ["--rolling_days=8", "--support_days=3"],
            "has before its last 8 days, which `rolling_days` forecasts; use at most 2",
        ),
        (["--rolling_days=11"], r"`rolling_days` \(=11\) is longer than the 10.0 days of city 'whole'"),
        (["--rolling_days=10"], "before its last 10 days, .*; give a series of at least a day before it"),
        (["--sampler=euler"], "`sampler` 'euler' needs schedule 'rectified_flow'"),
        (["--out_dir=foreign"], "'foreign' holds 'thesis.tex' but no forecasts"),
        (["--sources=a,b"], "--sources is of a run, and --city takes none"),
        (["--preset=tiny"], "--preset is of a run, and --city takes none"),
    ],
    ids=lambda value: value[0].removeprefix("--") if isinstance(value, list) else "",
)
def test_a_mistake_is_refused_in_one_line(faulty, monkeypatch, words, expected):
    monkeypatch.chdir(faulty)
    usual = ["--hypernetwork=made", "--city=whole.npz", "--out_dir=refused"]
    with flagsaver.flagsaver(), pytest.raises(gpd.InputError, match=expected) as caught:
        flags.FLAGS(["generate", *usual, *words])
        generate.main([])
    assert "\n" not in str(caught.value)
    assert not (faulty / "refused" / "generate.json").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--rolling_days=2", "--target=a"], "--rolling_days needs --city"),
        (["--hypernetwork=made"], "--hypernetwork needs --city"),
    ],
)
def test_half_of_what_a_new_city_needs_is_refused(words, expected):
    with flagsaver.flagsaver(), pytest.raises(gpd.InputError, match=expected):
        flags.FLAGS(["generate", *words])
        generate.main([])


def test_parameters_of_other_regions_are_refused_and_what_is_no_parameters_too(folder):
    city, hypernetwork = gpd.load_city(folder / "whole.npz"), gpd.Hypernetwork.load(folder / "made")
    new = gpd.prepare_new_city(city, hypernetwork)
    params = {"bias": jnp.zeros((1, 5, 6)), "scale": jnp.ones((1, 5, 6, 1))}
    with pytest.raises(gpd.InputError, match="for 5 regions and city 'whole' has 8"):
        gpd.forecast_new_city(gpd.RegionParameters(params, "linear", _DATA), new)
    with pytest.raises(gpd.InputError, match="no parameters of a city at"):
        gpd.load_parameters(folder / "nowhere")


def test_what_a_value_makes_missing_is_told(folder):
    city = gpd.load_city(folder / "whole.npz")
    limit = float(np.sort(city.values[np.isfinite(city.values)])[-3])
    (line,) = new_city.notes_above(folder / "whole.npz", limit)
    step, region, channel = np.argwhere(city.values > limit)[0]
    when = city.start + np.timedelta64(int(step) * city.interval_minutes, "m")
    first = f"{city.values[step, region, channel]:.7g} of region '{city.node_ids[region]}' at {when}"
    assert line == f"2 readings above {limit:g} are missing, the first {first}"
    assert new_city.notes_above(folder / "whole.npz", None) == []


def test_the_next_hours_come_as_a_table_by_another_command(folder, tmp_path):
    words = [f"--hypernetwork={folder / 'made'}", f"--city={folder / 'whole.npz'}", f"--model={folder / 'linear.py'}"]
    command = [sys.executable, "-m", "experiments.forecast", *words, "--samples=3", "--seed=7"]
    how = {"capture_output": True, "text": True, "timeout": 120, "check": False, "cwd": tmp_path}
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "LC_ALL": "C.UTF-8"}
    result = subprocess.run([*command, "--at=2024-01-15T12:30", "--missing_above=1e9"], **how, env=environment)
    assert (result.returncode, result.stderr) == (0, "no reading is above 1e+09\n")
    city, hypernetwork = gpd.load_city(folder / "whole.npz"), gpd.Hypernetwork.load(folder / "made")
    at = np.datetime64("2024-01-15T12:30", "m")
    new = gpd.prepare_new_city(city, hypernetwork, at=at)
    config = gpd.GenerateConfig(samples=3)
    parameters = hypernetwork.generate(new.prompts, key=jax.random.key(7), config=config)
    made = gpd.forecast_next(parameters, city, at=at)
    rows = [line.split(",") for line in (tmp_path / "next.csv").read_text().splitlines()]
    assert rows[0] == ["unique_id", "ds", "mean", "q05", "q25", "q50", "q75", "q95"] and len(rows) == 1 + 8 * 6
    assert rows[1][:2] == [city.node_ids[0], "2024-01-15T12:00"]
    np.testing.assert_allclose([float(row[2]) for row in rows[1:]], made.forecast.reshape(-1), rtol=1e-5)
    assert made.quantiles is not None
    np.testing.assert_allclose([float(row[7]) for row in rows[1:]], made.quantiles[..., 4].reshape(-1), rtol=1e-5)
    written = (tmp_path / "next.csv").read_bytes()
    for words, said in ((["--out_file=next.txt"], "is no table; name it .csv"), (["--at=now"], "must be an ISO time")):
        wrong = subprocess.run([*command, *words], **how, env=environment)
        assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and said in wrong.stderr
    assert (tmp_path / "next.csv").read_bytes() == written
