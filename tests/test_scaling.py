"""In: measurements that follow a law, made up. Out: the law, found from the small ones; and a document that says so."""

import itertools
import json
import pathlib
import re
import sys

import numpy as np
import pytest

from benchmarks.scaling_case import kept, run_case
from benchmarks.scaling_report import CITIES, SPREAD, SPREAD_CASES, STAGES, TOKENS, fit, write_report
from gpdiff_jax.errors import InputError

_LAW = (3.0, 2e-3, 5e-7, 0.0)


def _lines():
    lines = []
    for stage, metric in itertools.product(STAGES, ("time", "memory")):
        sizes = [(f"regions_{count}", count, 28) for count in (250, 500, 1000, 2000, 16000)]
        if stage not in ("pretrain", "generate"):
            sizes += [(f"days_{days}", 200, days) for days in (28, 56, 112, 448)]
        for case, regions, days in sizes:
            value = float(np.dot(_LAW, (1, regions, regions * days * 24, 0)))
            lines.append(_line(case, stage, metric, value, regions=regions, days=days))
    for width, metric in itertools.product((4096, 2048, 1024, 512, 128), ("time", "memory")):
        tokens = 36638 // width
        value = 1.0 + 0.1 * tokens + 0.002 * tokens**2
        lines.append(_line(f"width_{width}", "pretrain", metric, value, regions=100, days=28, tokens=tokens))
    for (kind, part), count, stage in itertools.product(SPREAD_CASES, (2, 1), SPREAD):
        seconds = 8.0 if part == "weak" else 8.0 / count
        lines.append(_line(f"{kind}_{count}_{part}", stage, "time", seconds, regions=128, days=28))
    return lines


def _line(case, stage, metric, value, **sizes):
    return {"case": case, "stage": stage, "metric": metric, "value": value, **sizes}


def _of(lines, stage, metric, kinds):
    return [
        line for line in lines if (line["stage"], line["metric"]) == (stage, metric) and line["case"].startswith(kinds)
    ]


def test_the_costs_are_found_from_the_small_cases_alone():
    lines = _of(_lines(), "harvest", "time", ("regions", "days"))
    for line in lines:
        if line["case"] not in CITIES.fitted:
            line["value"] *= 10  # and so must not count
    model = fit(CITIES, lines)
    np.testing.assert_allclose(model.costs, _LAW, rtol=1e-6, atol=1e-12)
    large = next(line for line in lines if line["case"] == "regions_16000")
    assert model.predict(large) == pytest.approx(large["value"] / 10)


def test_of_two_parts_that_the_cases_cannot_tell_apart_the_first_is_taken():
    lines = _of(_lines(), "generate", "time", ("regions", "days"))
    noise = np.random.default_rng(0)
    for line in lines:
        line["value"] *= 1 + 0.02 * noise.normal()
    fixed, region, reading, _ = fit(CITIES, lines).costs
    assert reading == 0.0 and region == pytest.approx(_LAW[1] + 28 * 24 * _LAW[2], rel=0.1) and fixed > 0


def test_a_part_that_would_be_below_zero_is_none():
    lines = _of(_lines(), "pretrain", "time", "width")
    for line in lines:
        line["value"] = 5.0 - 0.001 * line["tokens"]
    model = fit(TOKENS, lines)
    assert model.costs[1:] == (0.0, 0.0) and model.costs[0] == pytest.approx(5.0, rel=0.02)
    with pytest.raises(InputError, match="too few to fit 3 parts"):
        fit(TOKENS, lines[:2])


def test_the_document_holds_what_was_predicted_and_what_was_gained(tmp_path):
    path = tmp_path / "scaling.md"
    path.write_text("before\n<!-- tables -->\nold\n<!-- end of tables -->\nafter\n")
    write_report(_lines(), path)
    text = path.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| harvest | 3 | 2 | 0.5 | 0 | 3 | 2.1e+03 | 5.4e+02 | 0 |" in text
    large = float(np.dot(_LAW, (1, 16000, 16000 * 28 * 24, 0)))
    assert f"| regions 16000 | {' | '.join([f'{large:.3g} (+0 %)'] * 12)} |" in text
    assert "regions 2000" not in text and "| 286 tokens | 193 (+0 %)" in text
    assert "| strong | 2 devices | 4.0 (2.00) | 4.0 (2.00) | 4.0 (2.00) |" in text
    assert "| weak | 2 hosts | 8.0 (2.00) |" in text
    assert text.index("| weak | 1 host |") < text.index("| weak | 2 hosts |")
    assert all((tmp_path / f"scaling_{name}.svg").read_text().startswith("<?xml") for name in ("growth", "devices"))


def test_the_document_holds_the_tables_of_what_was_measured(tmp_path):
    root = pathlib.Path(__file__).resolve().parents[1]
    text = (root / "docs" / "scaling.md").read_text()
    (tmp_path / "scaling.md").write_text(text)
    results = (root / "benchmarks" / "results" / "scaling_amd_epyc.jsonl").read_text().splitlines()
    write_report([json.loads(line) for line in results], tmp_path / "scaling.md")
    assert (tmp_path / "scaling.md").read_text() == text


def test_the_document_is_made_of_what_there_is(tmp_path):
    path = tmp_path / "scaling.md"
    path.write_text("<!-- tables -->\n<!-- end of tables -->\n")
    write_report([line for line in _lines() if line["case"].startswith(("regions", "days"))], path)
    assert "| regions 16000 |" in path.read_text() and "tokens" not in path.read_text()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["scaling.md", "scaling_growth.svg"]


def test_of_a_case_that_did_not_end_the_document_says_so(tmp_path):
    path = tmp_path / "scaling.md"
    path.write_text("<!-- tables -->\n<!-- end of tables -->\n")
    lines = _lines()
    for line in lines:
        if line["case"] in ("regions_16000", "devices_2_strong"):
            line["unfinished"] = "takes too long"
    lines = [line for line in lines if "unfinished" not in line or line["stage"] in ("sources", SPREAD[0])]
    write_report(lines, path)
    text = path.read_text()
    large = float(np.dot(_LAW, (1, 16000, 16000 * 28 * 24, 0)))
    assert f"| regions 16000, unfinished | {large:.3g} (+0 %) |  |  | {large:.3g} (+0 %) |  |  |" in text
    assert "| days 448 |" in text
    assert "| strong | 1 device |" in text and "| strong | 2 devices |" not in text and "| weak | 2 devices |" in text


@pytest.mark.parametrize(
    ("then", "why"),
    [
        ("exit 1", "failed; its own message says why"),
        ("exec sleep 60", r"takes more than 0\.0\d+ minutes; give it more"),
    ],
)
def test_of_a_case_that_does_not_end_its_finished_stages_are_kept_until_it_does(tmp_path, monkeypatch, then, why):
    def program(text: str) -> None:
        path = pathlib.Path(tmp_path / "program")
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    lines = [{"case": "regions_9", "metric": "time", "value": value} for value in (1.0, 2.0)]
    say = "\n".join(f"echo '{json.dumps(line)}'" for line in lines)
    other = {"case": "days_9", "metric": "time", "value": 3.0}
    program(f"echo a network says something\n{say}\nprintf '{{\"case\": '\n{then}")
    said, error = run_case("regions_9", 5.0 if then == "exit 1" else 2.0)
    assert error is not None and re.search(why, error)
    held = kept([other], "regions_9", said, error)
    assert held == [other, *({**line, "unfinished": error} for line in lines)]
    # A later try that comes less far changes nothing; one that ends is what counts.
    assert kept(held, "regions_9", said[:2], error) == held
    program(f"{say}\n{say}")
    said, error = run_case("regions_9", 5.0)
    assert error is None and kept(held, "regions_9", said, error) == [other, *lines, *lines]
