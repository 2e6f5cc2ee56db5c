"""In: run folders with errors of regions. Out: differences, shares and ranks as by hand, and what is refused."""

import csv
import json

import numpy as np
import pytest
import scipy.stats

from experiments import summarize
from gpdiff_jax.analysis.paired import average_ranks, paired_differences
from gpdiff_jax.errors import InputError
from tests.commands import run_here


def _write(folder, seed: int, errors: dict[str, list[float | None]], target: str = "springfield"):
    folder.mkdir()
    methods = {
        name: {"mae_mean": float(np.mean([v for v in values if v is not None]))} for name, values in errors.items()
    }
    (folder / "metrics.json").write_text(json.dumps({"target": target, "seed": seed, "methods": methods}))
    with (folder / "regions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["region", "channel", "method", "mae"])
        for name, values in errors.items():
            writer.writerows(
                [f"r{number}", "", name, "" if value is None else value] for number, value in enumerate(values)
            )
    return folder


def test_regions_are_compared_over_the_mean_of_the_seeds(tmp_path):
    one = _write(tmp_path / "one", 0, {"a": [1, 2, 3, 4, None], "b": [2, 2, 5, 3, 9], "c": [1, 2, 3, 4, None]})
    two = _write(tmp_path / "two", 1, {"b": [2, 4, 5, 3, 9], "a": [1, 2, 5, 4, None], "c": [1, 2, 5, 4, None]})
    same, far = paired_differences([one, two], "a")
    # b's means are 2, 3, 5, 3 and a's 1, 2, 4, 4; the fifth region has no error of a.
    assert (far.method, far.regions, far.better) == ("b", 4, 0.75)
    assert far.difference == pytest.approx(11 / 13 - 1)
    assert far.p == scipy.stats.wilcoxon([1, 2, 4, 4], [2, 3, 5, 3]).pvalue
    assert (same.method, same.difference, same.better, same.p) == ("c", 0.0, 0.0, None)


def test_a_difference_in_every_region_is_told_from_chance(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.uniform(5, 10, 40)
    errors = {"a": base.tolist(), "worse": (1.05 * base).tolist(), "alike": (base + rng.normal(size=40)).tolist()}
    found = {one.method: one for one in paired_differences([_write(tmp_path / "run", 0, errors)], "a")}
    assert found["worse"].p < 1e-6 and found["worse"].difference == pytest.approx(1 / 1.05 - 1)
    assert found["alike"].p > 0.01


def test_channels_are_compared_apart(tmp_path):
    run = _write(tmp_path / "run", 0, {"a": [1.0, 1.0], "b": [2.0, 2.0]})
    (run / "regions.csv").write_text(
        "region,channel,method,mae\nr0,speed,a,1\nr0,speed,b,2\nr0,count,a,1000\nr0,count,b,999\nr1,count,b,9\n"
    )
    count, speed = paired_differences([run], "a")
    assert (count.channel, count.regions, count.better) == ("count", 1, 0.0)
    assert (speed.channel, speed.difference, speed.better) == ("speed", -0.5, 1.0)


def test_ranks_are_means_over_runs_of_any_targets(tmp_path):
    one = _write(tmp_path / "one", 0, {"a": [1.0], "b": [2.0], "c": [3.0], "only": [0.0]})
    two = _write(tmp_path / "two", 0, {"c": [1.0], "a": [1.0], "b": [5.0]})
    assert average_ranks([one, two]) == {"a": 1.25, "c": 2.25, "b": 2.5}
    with pytest.raises(InputError, match="no method has an error in all of these runs"):
        average_ranks([_write(tmp_path / "three", 0, {"d": [1.0]}), one])


def test_what_is_no_run_of_the_method_is_refused(tmp_path):
    run = _write(tmp_path / "run", 0, {"a": [1.0, 2.0], "b": [2.0, 3.0]})
    with pytest.raises(InputError, match="has no method 'z'; it has a, b"):
        paired_differences([run], "z")
    other = _write(tmp_path / "other", 1, {"a": [1.0], "b": [2.0]})
    with pytest.raises(InputError, match="hold other regions"):
        paired_differences([run, other], "a")
    with pytest.raises(InputError, match="no run folder to compare"):
        paired_differences([], "a")
    with pytest.raises(InputError, match="no run folder to rank"):
        average_ranks([])
    with pytest.raises(InputError, match="have the same settings and the same seed"):
        paired_differences([run, run], "a")
    elsewhere = _write(tmp_path / "elsewhere", 1, {"a": [1.0, 2.0], "b": [2.0, 3.0]}, target="shelbyville")
    with pytest.raises(InputError, match="the runs differ in more than the seed"):
        paired_differences([run, elsewhere], "a")
    for folder in (run, elsewhere):
        (folder / "config.json").write_text(json.dumps({"settings": {"simulation": {"cities": 2}}}))
    (elsewhere / "metrics.json").write_text((run / "metrics.json").read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(InputError, match="simulate other cities for every seed"):
        paired_differences([run, elsewhere], "a")
    (run / "config.json").unlink()
    (other / "regions.csv").write_text("region,channel,method,mae\nr0,,a,many\n")
    with pytest.raises(InputError, match=r"cannot be read \(.*many.*\); run transfer again"):
        paired_differences([other], "a")
    (other / "regions.csv").unlink()
    with pytest.raises(InputError, match=r"has no regions\.csv; finish it with experiments"):
        paired_differences([other], "a")


def test_the_command_prints_them(tmp_path):
    run = _write(tmp_path / "run", 0, {"a": [1.0, 2.0], "b": [2.0, 3.0]})
    shown = run_here(
        summarize.main, "--against=a", "--ranks", str(run), cwd=tmp_path, positional="RUN_DIR ..."
    ).stdout.splitlines()
    assert shown[0] == "mean rank over 1 runs, of 2 methods:" and shown[1].split() == ["1.00", "a"]
    assert "error  -40.0 %  better in 100 % of 2 regions" in shown[-1]
