"""In: forecasts of another program. Out: a row of a run's table, judged as its own are; or what is wrong with them."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from experiments.evaluate import show
from experiments.run_flags import run_main
from gpdiff_jax import InputError, Run
from gpdiff_jax.analysis.paired import paired_differences
from gpdiff_jax.analysis.summary import summarize_runs
from gpdiff_jax.run.outside import in_order_of_run
from gpdiff_jax.run.results import results_table
from gpdiff_jax.run.settings import METHODS
from tests.commands import run_here
from tests.runs import tiny_settings, without_seconds


@pytest.fixture(name="run")
def _run(finished, data_dir, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    with Run.open(tmp_path / "run", tiny_settings(data_dir)) as run:
        yield run


@pytest.fixture(name="held")
def _held(finished):
    with np.load(finished[0] / "forecasts.npz") as held:
        return dict(held)


def test_forecasts_of_another_program_are_a_row_of_every_table(run, finished, held, data_dir):
    # Forecasts that are a method's own get that method's numbers, whatever the order that they come in.
    forecast = held["gpdiff_few_shot"]
    windows, regions = (np.random.default_rng(0).permutation(size) for size in forecast.shape[:2])
    run.add_forecasts(
        "mine",
        np.pad(forecast[windows][:, regions], ((0, 1), (0, 1), (0, 0)), constant_values=np.nan),
        window_start=[*held["window_start"][windows].astype("datetime64[m]"), np.datetime64("1999-01-01T00:00")],
        node_ids=np.char.encode([*held["node_ids"][regions], "elsewhere"]),  # as HDF5 gives them
    )
    content = run.evaluate()
    (row,) = [line.split() for line in results_table(content).splitlines() if line.startswith("mine ")]
    assert row[-2:] == ["-", "-"]
    mine = content["methods"].pop("mine")
    assert without_seconds(content) == without_seconds(finished[1])
    # How they were made is not known.
    how = ("seconds", "training_seconds", "learning_rate", "steps", "validation_mae", "shared_steps", "shared_rate")
    assert mine == {**finished[1]["methods"]["gpdiff_few_shot"], **dict.fromkeys(how)}
    np.testing.assert_array_equal(run.forecast("mine").forecast, forecast)
    assert "mine" in (run.folder / "report.html").read_text()
    (paired,) = [one for one in paired_differences([run.folder], "gpdiff_few_shot") if one.method == "mine"]
    assert paired.difference == 0 and paired.regions == len(held["node_ids"])
    assert summarize_runs([run.folder])[0].methods["mine"]["mae_mean"].mean == mine["mae_mean"]
    # A later run of the same settings still has them; other ones of the name take their place.
    run.close()
    with Run.open(run.folder, tiny_settings(data_dir)) as again:
        assert again.evaluate()["methods"]["mine"] == mine
        again.add_forecasts("mine", held["truth"])
        assert again.evaluate()["methods"]["mine"]["mae_mean"] == 0


def test_every_channel_has_its_regions(data_dir, tmp_path):
    settings = tiny_settings(data_dir, methods=("last_value",), channels="each")
    with Run.open(tmp_path / "run", settings) as run:
        run.evaluate()
        with np.load(run.folder / "forecasts.npz") as held:
            truth, names = held["truth"], held["node_ids"]
        channels = len(run.target_cities)
        parts = in_order_of_run(run, "mine", truth[:, ::-1], node_ids=names[::-1])
        assert len(parts) == channels and truth.shape[1] == channels * run.target_cities[0].num_nodes
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), truth)


_MISTAKES = (
    (
        lambda f, w, n: {"forecast": f.swapaxes(1, 2)},
        r"must be .* windows, regions, steps; swap the last two",
    ),
    (lambda f, w, n: {"forecast": f[1:]}, r"which must be \(\d+, 8, \d+\): windows, regions, steps"),
    (lambda f, w, n: {"forecast": np.ma.masked_less(f, np.inf)}, r"not finite in \d+ places"),
    (lambda f, w, n: {"forecast": f * np.nan}, r"not finite in \d+ places .* window of 20\d\d-.*, region '"),
    (lambda f, w, n: {"forecast": f.astype(str)}, "hold <U32; give real numbers"),
    (lambda f, w, n: {"forecast": f[1:], "window_start": w[1:]}, r"lack 1 of the \d+ windows .* first '20"),
    (lambda f, w, n: {"forecast": f[:, 1:], "node_ids": n[1:]}, "lack 1 of the 8 regions"),
    (lambda f, w, n: {"forecast": f, "node_ids": [*n[:-1], n[0]]}, "name a region twice"),
    (lambda f, w, n: {"forecast": f, "window_start": n}, "must be local times as 2020-01-31T08:00"),
    # With an offset they would be other hours, all of which may be there.
    (lambda f, w, n: {"forecast": f, "window_start": [f"{t}+02:00" for t in w]}, "must be local times"),
    (lambda f, w, n: {"forecast": f, "window_start": [f"{t}Z" for t in w]}, "must be local times"),
    (lambda f, w, n: {"forecast": f, "window_start": w.astype("datetime64[s]").astype(int)}, "of type int64"),
    (lambda f, w, n: {"forecast": f, "window_start": ["NaT", *w[1:]]}, "number 0 is unknown"),
    (lambda f, w, n: {"forecast": [[1.0], [1.0, 2.0]]}, "the numbers are no array"),
    (lambda f, w, n: {"forecast": f, "node_ids": [["a"], "b"]}, "the names of every region are no array"),
    (lambda f, w, n: {"forecast": f.astype(float) + 1e39}, "are not finite in"),
    (lambda f, w, n: {"forecast": f.astype("timedelta64[s]")}, "hold timedelta64"),
    (lambda f, w, n: {"forecast": f, "window_start": w[:, None]}, "must be a list, got shape"),
)


def test_what_does_not_fit_the_run_is_refused_and_nothing_is_kept(run, held):
    for make, words in _MISTAKES:
        with pytest.raises(InputError, match=words):
            run.add_forecasts("mine", **make(held["gpdiff_few_shot"], held["window_start"], held["node_ids"]))
    for name in ("gpdiff_few_shot", "gpdiff_of_mine", "all", "Mine", "../mine", "", "a" * 61):
        with pytest.raises(InputError, match="name"):
            run.add_forecasts(name, held["truth"])
    assert not [path for path in run.folder.glob("methods/*") if "mine" in path.name.lower()]


def test_forecasts_of_another_run_are_not_taken(run, held, data_dir, tmp_path, capsys):
    run.add_forecasts("mine", held["gpdiff_few_shot"])
    settings = tiny_settings(data_dir, methods=("last_value",))
    data = dataclasses.replace(settings.data, support_days=settings.data.support_days + 1)
    with Run.open(tmp_path / "other", dataclasses.replace(settings, data=data)) as other:
        other.evaluate()
        shutil.copy(run.folder / "methods" / "mine_0.npz", other.folder / "methods")
        assert "mine" not in other.evaluate()["methods"]
        assert "mine_0.npz' was not added to this run" in capsys.readouterr().err
        with pytest.raises(InputError, match="'mine', which is no method"):
            other.forecast("mine")


def test_the_command_takes_files(held, data_dir, tmp_path):
    np.savez(tmp_path / "mine.npz", forecast=held["truth"], node_ids=held["node_ids"])
    np.savez(tmp_path / "other.npz", prediction=held["truth"])
    flags = (
        f"--preset tiny --data_dir {data_dir} --sources crowd_0,crowd_1 --target crowd_2 --methods last_value".split()
    )

    def evaluate(word: str):
        return run_here(run_main(show), *flags, "--forecasts", word, "--out_dir", word[:3], cwd=tmp_path)

    done = evaluate("mine=mine.npz,again=mine.npz")
    assert done.returncode == 0, done.stderr
    methods = json.loads((tmp_path / "min" / "metrics.json").read_text())["methods"]
    assert list(methods) == ["last_value", "again", "mine"] and methods["mine"]["mae_mean"] == 0
    assert [line.split()[0] for line in done.stdout.splitlines()[1:3]] == ["again", "mine"]
    mistakes = {
        "none": "--forecasts names 'none'; write NAME=FILE.npz",
        "two=mine.npz,two=other.npz": "--forecasts names 'two' twice",
        "key=other.npz": "other.npz holds prediction; store the forecasts under `forecast`",
        "gone=gone.npz": "gone.npz",
    }
    for word, said in mistakes.items():
        refused = evaluate(word)
        assert refused.returncode == 2 and said in refused.stderr.splitlines()[-1], refused.stderr


def test_what_lies_among_the_forecasts_unasked_is_named_and_left(run, held, capsys):
    folder, files = run.folder / "methods", {}
    run.add_forecasts("mine", held["truth"])
    np.savez(folder / "copied_0.npz", forecast=held["truth"], seconds=1.0)
    np.savez(folder / "short_0.npz", forecast=held["truth"][:3])
    (folder / "Notes_0.npz").write_text("mine")
    damaged = (folder / "mine_0.npz").read_bytes()[:-40]
    (folder / "broken_0.npz").write_bytes(damaged)
    for name in ("copied_0.npz", "short_0.npz", "Notes_0.npz", "broken_0.npz"):
        files[name] = (folder / name).read_bytes()
    capsys.readouterr()
    assert [name for name in run.evaluate()["methods"] if name not in METHODS] == ["mine"]
    said = capsys.readouterr().err
    assert said.count("was not added to this run") == 2 and said.count("is damaged") == 1 and "'Notes'" in said
    assert {name: (folder / name).read_bytes() for name in files} == files
    with pytest.raises(InputError, match="'copied', which is no method"):
        run.forecast("copied")
