"""In: small run folders written by hand.
Out: that they are grouped, averaged and refused as promised.
"""

import json
import statistics

import pytest

from gpdiff_jax.analysis import summary
from gpdiff_jax.errors import InputError


def _write_run(folder, *, seed=0, methods=None, flags=None, **changes):
    folder.mkdir(parents=True)
    content = {
        "target": "springfield",
        "unit": "km/h",
        "horizon_minutes": [60, 120],
        "seed": seed,
        "covariates": "none",
        "support_days": 3,
        "sources": ["shelbyville", "ogdenville"],
        "protocol": "leak-free",
        "methods": methods or {"last_value": {"mae": [1.0, 3.0], "mae_mean": 2.0, "rmse_mean": 3.0, "seconds": 0.1}},
    } | changes
    (folder / "metrics.json").write_text(json.dumps(content))
    if flags is not None:
        (folder / "config.json").write_text(json.dumps({"flags": flags}))
    return folder


def _methods(**mae):
    return {name: {"mae": [value], "mae_mean": value, "seconds": 1.0} for name, value in mae.items()}


def test_means_and_standard_deviations_over_seeds(tmp_path):
    values = {1: (4.0, 6.0), 2: (5.0, 6.5), 7: (9.0, 5.5)}
    runs = [_write_run(tmp_path / str(s), seed=s, methods=_methods(a=a, b=b)) for s, (a, b) in values.items()]
    (group,) = summary.summarize_runs(runs)
    assert group.seeds == (1, 2, 7)
    a = group.methods["a"]["mae_mean"]
    assert (a.mean, a.std, a.runs) == (6.0, pytest.approx(statistics.stdev([4.0, 5.0, 9.0])), 3)
    b = group.methods["b"]["mae_mean"]
    assert (b.mean, b.std) == (6.0, pytest.approx(0.5))
    assert group.methods["a"]["rmse_mean"] == summary.Statistic(None, None, 0)


def test_best_method_comes_first_and_nulls_last(tmp_path):
    run = _write_run(tmp_path / "r", methods=_methods(worse=3.0, failed=None, best=1.0))
    (group,) = summary.summarize_runs([run])
    assert list(group.methods) == ["best", "worse", "failed"]
    assert group.methods["best"]["mae_mean"] == summary.Statistic(1.0, None, 1)


def test_a_method_that_some_runs_lack_counts_its_own_runs(tmp_path):
    runs = [
        _write_run(tmp_path / "0", seed=0, methods=_methods(a=1.0, b=2.0)),
        _write_run(tmp_path / "1", seed=1, methods=_methods(a=3.0)),
        _write_run(tmp_path / "2", seed=2, methods=_methods(a=float("nan"), b=4.0)),
    ]
    (group,) = summary.summarize_runs(runs)
    assert (group.methods["a"]["mae_mean"].mean, group.methods["a"]["mae_mean"].runs) == (2.0, 2)
    assert (group.methods["b"]["mae_mean"].mean, group.methods["b"]["mae_mean"].runs) == (3.0, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"target": "x"},
        {"covariates": "profile"},
        {"support_days": 1},
        {"sources": ["shelbyville"]},
        {"horizon_minutes": [15, 30]},
        {"protocol": "paper"},
        {"flags": {"model": "gwnet"}},
    ],
)
def test_runs_that_differ_in_more_than_the_seed_are_never_averaged(tmp_path, change):
    one = _write_run(tmp_path / "1", flags={"model": "stgcn", "seed": 0})
    two = _write_run(tmp_path / "2", **({"flags": {"model": "stgcn", "seed": 0}} | change))
    groups = summary.summarize_runs([one, two])
    assert [group.seeds for group in groups] == [(0,), (0,)]


def test_order_of_sources_and_of_folders_does_not_matter(tmp_path):
    runs = [
        _write_run(tmp_path / "1", seed=1, methods=_methods(a=1.0, b=2.0)),
        _write_run(tmp_path / "2", seed=2, methods=_methods(b=1.0, a=2.5), sources=["ogdenville", "shelbyville"]),
    ]
    assert summary.summarize_runs(runs) == summary.summarize_runs(runs[::-1])
    assert len(summary.summarize_runs(runs)) == 1


def test_channels_are_tables_of_their_own(tmp_path):
    channels = {"pickups": {"unit": "pickups per h", "methods": _methods(a=10.0)}}
    runs = [_write_run(tmp_path / str(s), seed=s, methods=_methods(a=1.0), channels=channels) for s in range(2)]
    whole, pickups = summary.summarize_runs(runs)
    assert (whole.settings["channel"], pickups.settings["channel"]) == ("", "pickups")
    assert pickups.settings["unit"] == "pickups per h"
    assert pickups.methods["a"]["mae_mean"].mean == 10.0


def test_same_seed_twice_is_refused(tmp_path):
    runs = [_write_run(tmp_path / name, seed=5) for name in ("one", "two")]
    with pytest.raises(InputError, match=r"one' and .*two' have the same settings and the same seed \(=5\)"):
        summary.summarize_runs(runs)
    with pytest.raises(InputError, match="same seed"):
        summary.summarize_runs([runs[0], runs[0]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no metrics.json"),
        ("{", "is not JSON"),
        ("[1]", "must hold a JSON object, not list"),
        ('{"target": "a"}', "`target` .* and `seed`"),
        ('{"target": "a", "seed": true}', "`target` .* and `seed`"),
        ('{"target": "a", "seed": 1, "methods": {}}', "`methods` must map"),
        (
            '{"target": "a", "seed": 1, "methods": {"m": {"mae_mean": "2"}}}',
            "mae_mean of m .* must be a number or null",
        ),
        ('{"target": "a", "seed": 1, "methods": {"m": {}}, "channels": [1]}', "`channels` must map"),
    ],
)
def test_broken_folders_are_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        summary.summarize_runs([tmp_path])
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_no_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        summary.summarize_runs([tmp_path / "absent"])
    with pytest.raises(InputError, match="at least one"):
        summary.summarize_runs([])


def test_text_and_markdown_tables(tmp_path):
    runs = [
        _write_run(tmp_path / "0", seed=0, methods=_methods(**{"a": 118.0, "odd|name": 0.5})),
        _write_run(tmp_path / "1", seed=1, methods=_methods(**{"a": 120.0})),
    ]
    groups = summary.summarize_runs(runs)
    lines = summary.format_groups(groups, style="text", metrics=["mae_mean", "rmse_mean"]).splitlines()
    assert lines[0].startswith("target springfield; unit km/h; covariates none; support_days 3;")
    assert lines[0].endswith("seeds 0, 1")
    assert [line.split() for line in lines[2:]] == [
        ["method", "mae_mean", "rmse_mean", "runs"],
        ["-" * len(lines[3])],
        ["odd|name", "0.5000", "±", "-", "-", "1"],
        ["a", "119.0", "±", "1.414", "-", "2"],
    ]
    assert len({len(line) for line in lines[2:]}) == 1
    markdown = summary.format_groups(groups, style="markdown", metrics=["mae_mean"]).splitlines()
    assert markdown[2:] == [
        "| method | mae_mean | runs |",
        "|---|---:|---:|",
        "| odd\\|name | 0.5000 ± - | 1 |",
        "| a | 119.0 ± 1.414 | 2 |",
    ]


def test_json_table_round_trips(tmp_path):
    groups = summary.summarize_runs([_write_run(tmp_path / "0", seed=3, methods=_methods(a=2.0, b=None))])
    (group,) = json.loads(summary.format_groups(groups, style="json", metrics=["mae_mean"]))
    assert group["seeds"] == [3] and group["settings"]["target"] == "springfield"
    assert group["methods"] == {
        "a": {"mae_mean": {"mean": 2.0, "std": None, "runs": 1}},
        "b": {"mae_mean": {"mean": None, "std": None, "runs": 0}},
    }


def test_unknown_style_or_metric_is_refused():
    with pytest.raises(InputError, match=r"`style` \(='csv'\)"):
        summary.format_groups([], style="csv", metrics=["mae_mean"])
    with pytest.raises(InputError, match=r"`metric` \(='mea'\)"):
        summary.format_groups([], style="text", metrics=["mea"])
