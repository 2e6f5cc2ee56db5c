"""In: a run folder made up with seeded random numbers.
Out: that its page is whole, self-contained, escaped and the same every time.
"""

import csv
import datetime
import html.parser
import json
import re
from typing import Any

import numpy as np
import pytest

from gpdiff_jax.analysis import metrics
from gpdiff_jax.errors import InputError
from gpdiff_jax.report import render_report
from gpdiff_jax.training.progress import LogWriter

_METHODS = {
    "historical_average": 1.28,
    "last_value": 1.6,
    "target_only": 1.4,
    "ridge_vector_autoregression": 1.33,
    "pooled_zero_shot": 1.25,
    "pooled_few_shot": 1.08,
    "meta_learned_few_shot": 1.1,
    "pooled_unchanged_zero_shot": 1.24,
    "zoo_mean_few_shot": 1.15,
    "nearest_prompt_few_shot": 1.17,
    "mlp_hypernetwork_few_shot": 1.06,
    "gpdiff_zero_shot": 1.18,
    "gpdiff_few_shot": 1.0,
}


def write_run(folder, *, regions=60, windows=168, located=True, names=None, calendar=True):
    """Writes a run folder as the transfer experiment does, of a city with a daily rhythm."""
    rng = np.random.default_rng(0)
    horizon = 6
    folder.mkdir(parents=True)
    node_ids = names or [f"station {i}" for i in range(regions)]
    start = datetime.datetime(2019, 1, 17, 6)
    hours = np.arange(windows)[:, None, None] + np.arange(horizon)[None, None, :] + 6
    size = rng.lognormal(5.0, 0.8, regions)[None, :, None]
    phase = rng.normal(0.0, 0.6, regions)[None, :, None]
    day = (hours // 24) % 7
    shape = np.exp(-0.5 * ((hours % 24 - 8.5 - phase) / 1.6) ** 2) + 0.8 * np.exp(-0.5 * ((hours % 24 - 18) / 2.4) ** 2)
    clean = size * (0.08 + shape * np.where((day == 2) | (day == 3), 0.55, 1.0))
    # The same clock hour must read the same in every window that holds it.
    grid = clean + 0.05 * size * rng.normal(size=(windows + horizon, regions, 1))[
        np.arange(windows)[:, None] + np.arange(horizon)[None, :]
    ][..., 0].transpose(0, 2, 1)
    truth = np.where(hours % 24 < 5, np.nan, grid).astype(np.float32)
    truth[:, 3] = np.nan
    weekend = ((day == 2) | (day == 3))[:, 0, :]
    skill = rng.uniform(0.5, 1.8, (1, regions, 1))

    def forecast(factor):
        drift = np.linspace(0.6, 1.4, horizon)[None, None, :]
        noise = rng.normal(size=truth.shape) * np.where(weekend[:, None, :], 1.5, 1.0)
        return (clean + 0.09 * factor**2 * skill * drift * size * noise).astype(np.float32)

    forecasts = {name: forecast(factor) for name, factor in _METHODS.items()}
    flags = weekend if calendar else None
    entries, rows = {}, []
    for name, values in forecasts.items():
        tuned = {"learning_rate": 1e-3, "steps": 80, "validation_mae": 30.0} if name.endswith("few_shot") else {}
        entries[name] = metrics.method_entry(values, truth, is_weekend=flags, seconds=3.2, **tuned)
        rows += metrics.region_rows(
            values,
            truth,
            is_weekend=flags,
            method=name,
            regions=node_ids,
            channel="entries",
            notes=["silent: no visible reading" if i == 3 else "" for i in range(regions)],
        )
    content = {
        "target": "hangzhou_metro", "target_kind": "crowd", "unit": "entries per 60 min", "seed": 0, "regions": regions,
        "horizon_minutes": [60 * (p + 1) for p in range(horizon)], "covariates": "profile", "support_days": 3,
        "sources": ["beijing_metro", "nyc_bike_2014", "nyc_taxi_zones_2018", "melbourne_pedestrians"],
        "protocol": "leak-free", "test_windows": windows, "silent_regions": [node_ids[3]], "methods": entries,
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(content))
    with (folder / "regions.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, metrics.REGION_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    starts = [
        (start + datetime.timedelta(hours=s)).isoformat(timespec="minutes") if calendar else f"step {s + 100}"
        for s in range(windows)
    ]
    ours: Any = {name: values for name, values in forecasts.items() if name.startswith("gpdiff")}
    spreads: Any = {f"{name}_std": np.abs(rng.normal(0.06, 0.02, truth.shape)) * clean for name in ours}
    np.savez(
        folder / "forecasts.npz", window_start=np.array(starts), node_ids=np.array(node_ids), truth=truth, **ours,
        **{name: values.astype(np.float32) for name, values in spreads.items()},
    )  # fmt: skip
    places = rng.normal(size=(regions, 2)) * 0.06
    coordinates: Any = {"latitude": 30.25 + places[:, 1], "longitude": 120.15 + places[:, 0]} if located else {}
    nearest = np.argsort(((places[:, None] - places[None]) ** 2).sum(-1), axis=1)[:, 1:3]
    zoo = np.concatenate([rng.normal(size=2) * 3 + rng.normal(size=(80, 2)) for _ in range(4)])
    np.savez(
        folder / "report.npz",
        senders=np.repeat(np.arange(regions), 2).astype(np.int32), receivers=nearest.ravel().astype(np.int32),
        zoo_projection=zoo, zoo_city=np.repeat(content["sources"], 80), pooled_projection=np.zeros((1, 2)),
        generated_projection=rng.normal(size=(regions, 2)) * 1.5, projection_variance=np.array([0.41, 0.17]),
        **coordinates,
    )  # fmt: skip
    with LogWriter(folder / "log.jsonl", clock=lambda: 1.7e9) as log:
        for step in range(0, 2000, 20):
            log.write("pooled", step, train_loss=0.3 + np.exp(-step / 300), validation_loss=0.35 + np.exp(-step / 300))
        for chunk in range(9):
            log.write("harvest", 500, chunk=chunk, validation_loss=0.3 - 0.01 * chunk, start_validation_loss=0.4)
        for step in range(0, 5000, 10):
            loss = 0.2 + np.exp(-step / 900) + 0.03 * abs(rng.normal())
            log.write("pretrain", step, loss=2 * loss, token_loss=loss, functional_loss=0.8 * loss, grad_norm=1.0)
        for name in (name for name in _METHODS if name.endswith("few_shot")):
            for rate in (1e-3, 3e-3):
                for step in range(0, 200, 20):
                    loss = _METHODS[name] * (0.4 + np.exp(-step * rate * 20))
                    log.write("adapt", step, method=name, learning_rate=rate, validation_loss=loss)
    settings = {
        "flags": {"target": "hangzhou_metro", "model": "stgcn", "preset": "small", "learning_rates": [1e-3, 3e-3]}
    }
    versions = {"jax": "0.10.2", "flax": "0.12.8"}
    (folder / "config.json").write_text(json.dumps({**settings, "seed": 0, "versions": versions, "device_kind": "cpu"}))
    return folder


class Page(html.parser.HTMLParser):
    """Checks that every element closes, and collects ids, addresses and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.tags, self.text = [], [], [], set(), []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href", "srcset", "action")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)


def _read(path):
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    return text, page, " ".join(" ".join(page.text).split())


@pytest.fixture(name="run", scope="module")
def _run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "x", regions=30, windows=80)


def test_page_is_whole_self_contained_and_says_what_was_found(run):
    path = render_report(run)
    assert path == run / "report.html"
    text, page, words = _read(path)
    assert "http://" not in text and "https://" not in text and "@import" not in text and "<link" not in text
    assert all(link.startswith("#") for link in page.links)
    # Inline figures share the page's name space: an id twice would draw one figure's ticks in another.
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links} | set(re.findall(r"url\(#([^)]+)\)", text)) <= set(page.ids)
    for name in _METHODS:
        assert f'data-method="{name}"' in text
    entries = json.loads((run / "metrics.json").read_text())["methods"]
    ours, rival = (entries[name]["mae_mean"] for name in ("gpdiff_few_shot", "mlp_hypernetwork_few_shot"))
    assert f"GPDiff few-shot is best, with a mean absolute error of {ours:.1f} entries per 60 min" in words
    assert f"{100 * (1 - ours / rival):.1f} % below the best baseline (MLP hypernetwork few-shot, {rival:.1f})" in words
    assert "6 hours ahead for the 30 regions of hangzhou_metro, after 3 visible days" in words
    assert text.count('<tr class="ours best"') == 1 and "station 3" in words
    assert "Sat 19 Jan" in words and "Not shown" not in words
    assert text.count("<svg") == text.count('role="img" aria-label="') == 12


def test_same_files_give_the_same_page_and_nothing_else_is_left(run):
    first = render_report(run).read_bytes()
    assert render_report(run).read_bytes() == first
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]


def test_a_failed_write_keeps_the_page_that_was_there(run, monkeypatch):
    before = render_report(run).read_bytes()

    def refuse(source, target):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="no space"):
        render_report(run)
    assert (run / "report.html").read_bytes() == before
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]


def test_hostile_names_are_only_words(tmp_path):
    evil = '<script>alert("1")</script>&"\'$x_'
    names = [f"{evil}{i}" for i in range(9)] + ["駅 10"]
    run = write_run(tmp_path / "x", regions=10, windows=30, names=names)
    content = json.loads((run / "metrics.json").read_text())
    content |= {"target": evil, "unit": evil, "sources": [evil], "covariates": evil}
    content["methods"][evil] = dict(content["methods"]["last_value"], mae_mean=0.001)
    (run / "metrics.json").write_text(json.dumps(content))
    (run / "config.json").write_text(json.dumps({"flags": {evil: evil}}))
    with LogWriter(run / "log.jsonl") as log:
        log.write("adapt", 3, method=evil, learning_rate=0.1, validation_loss=0.0)
    atlas: Any = dict(np.load(run / "report.npz"))
    atlas["zoo_city"] = np.array([evil] * len(atlas["zoo_city"]))
    np.savez(run / "report.npz", **atlas)
    text, _, words = _read(render_report(run))
    assert text.count("<script") == 1 and "alert(" in words
    assert evil in words


@pytest.mark.parametrize("absent", ["regions.csv", "forecasts.npz", "report.npz", "log.jsonl", "config.json"])
@pytest.mark.parametrize("how", ["gone", "broken"])
def test_absent_or_broken_file_is_said_and_the_rest_shown(run, tmp_path, absent, how):
    copy = tmp_path / "x"
    copy.mkdir()
    for path in run.iterdir():
        if path.name != absent:
            (copy / path.name).write_bytes(path.read_bytes())
        elif how == "broken":
            (copy / path.name).write_bytes(b'not what "it should be\n')
    _, _, words = _read(render_report(copy))
    assert f"Not shown: {absent} {'is not in the run folder' if how == 'gone' else ''}" in words
    assert words.count("Not shown") <= 2 and "GPDiff few-shot" in words


def test_nulls_and_an_unknown_calendar_are_shown_as_such(tmp_path):
    run = write_run(tmp_path / "x", regions=8, windows=30, located=False, calendar=False)
    content = json.loads((run / "metrics.json").read_text())
    failed = content["methods"]["target_only"]
    failed |= {"mae": [None] * 6, "rmse": [None] * 6, "mae_mean": None, "rmse_mean": None}
    content["methods"]["gpdiff_few_shot"]["mae"][2] = None
    content["channels"] = {"exits": {"unit": "exits", "methods": {"last_value": {"mae_mean": 2.0, "rmse_mean": 3.0}}}}
    (run / "metrics.json").write_text(json.dumps(content))
    text, _, words = _read(render_report(run))
    row = re.search(r'<tr data-method="target_only">.*?</tr>', text)
    assert row is not None and row.group().count("–") >= 3 and "nan" not in row.group().lower()
    assert "MAE, weekdays" not in words and "Weekends are shaded" not in words and "day 1" in words
    assert "laid out by the graph alone" in words and "Channel exits, in exits" in words


def test_nothing_observed_at_all(tmp_path):
    methods = {"gpdiff_few_shot": {"mae": [None], "mae_mean": None}, "last_value": {"mae": [None], "mae_mean": None}}
    content = {"target": "a", "seed": 1, "unit": "km/h", "horizon_minutes": [15], "regions": 1, "methods": methods}
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    _, _, words = _read(render_report(tmp_path))
    assert "No method has an error: nothing was observed" in words


def test_best_baseline_ahead_of_gpdiff_is_said_plainly(tmp_path):
    methods = {"gpdiff_few_shot": {"mae_mean": 11.0}, "pooled_few_shot": {"mae_mean": 10.0}}
    methods["historical_average"] = {"mae_mean": 22.0}
    content = {"target": "a", "seed": 1, "unit": "km/h", "protocol": "paper", "methods": methods}
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    _, _, words = _read(render_report(tmp_path))
    assert "Pooled few-shot is best, with a mean absolute error of 10.0 km/h." in words
    assert "GPDiff few-shot is at 11.0, 10.0 % above it and 50.0 % below the historical average (22.0)." in words
    assert "not leak-free" in words


def test_a_folder_without_metrics_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"has no metrics\.json"):
        render_report(tmp_path)
