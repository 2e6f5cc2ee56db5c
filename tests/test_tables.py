"""In: the script of the README's tables. Out: which runs it makes, and what it writes of their results."""

import json
import shutil
import subprocess
import sys

import pytest

from benchmarks.table_cases import Case, cases_of, readme_tables, write_tables
from gpdiff_jax.errors import InputError

_SIX = (
    *("beijing_metro", "hangzhou_metro", "nyc_bike_2014", "nyc_taxi_zones_2018", "melbourne_pedestrians"),
    "shenzhen_speed",
)


def test_no_run_is_trained_on_its_target_nor_on_the_same_service_of_another_year():
    cases = cases_of([0, 1], _SIX, ["four", "all"], ["profile", "calendar", "none"])
    assert len(cases) == len(set(cases)) == 2 * (6 + 5 + 4)
    assert cases[:6] == [Case(name, "four", "profile", 0) for name in _SIX]
    for case in cases:
        assert case.target not in case.cities and len(set(case.cities)) == len(case.cities)
        if case.target == "shenzhen_speed":
            assert len(case.cities) == 2
        else:
            assert len(case.cities) == 4 if case.sources == "four" else len(case.cities) > 8
    bikes = Case("nyc_bike_2014", "all", "profile", 0).cities
    assert "nyc_bike_2016" not in bikes and "taipei_metro" in bikes
    assert cases_of([0], ["hangzhou_metro"], ["four"], ["none"]) == [Case("hangzhou_metro", "four", "none", 0)]


def test_words_that_no_table_knows_are_named():
    with pytest.raises(InputError, match="`targets` names 'hangzhou'; use some of beijing_metro, "):
        cases_of([0], ["hangzhou"], ["four"], ["profile"])
    with pytest.raises(InputError, match="`sources` names 'five'; use some of four, all"):
        cases_of([0], ["hangzhou_metro"], ["five"], ["profile"])
    with pytest.raises(InputError, match="`covariates` names 'day'; use some of none, calendar, profile"):
        cases_of([0], ["hangzhou_metro"], ["four"], ["day"])
    with pytest.raises(InputError, match="no table has a run"):
        cases_of([0], ["beijing_metro"], ["all"], ["none"])


def test_a_table_has_a_row_for_every_method_and_a_column_for_every_target(finished, tmp_path):
    content = json.loads((finished[0] / "metrics.json").read_text())
    for seed in (0, 1):
        folder = tmp_path / "results" / f"hangzhou_metro-four-profile-{seed}"
        folder.mkdir(parents=True)
        shutil.copy(finished[0] / "config.json", folder)
        content["methods"]["last_value"]["mae_mean"] = 3.0 + seed
        content["methods"]["pooled_few_shot"]["mae_mean"] = 2.0 + 2 * seed
        (folder / "metrics.json").write_text(json.dumps(content | {"seed": seed}))
    (tmp_path / "results" / "other").mkdir()
    tables = readme_tables(tmp_path / "results")
    assert tables.startswith("`profile`, the same few sources, 2 seeds:\n\n|  | hangzhou_metro (")
    assert " | over pooled few shot |\n" in tables and "\n| pooled few shot | 3.00 ± 1.41 | 1.000 |\n" in tables
    assert "\n| last value | 3.50 ± 0.71 | 1.250 |\n" in tables and "| gpdiff few shot |" in tables
    assert "kernel average" not in tables
    # Of another target one run of two is there.
    shutil.copytree(
        tmp_path / "results" / "hangzhou_metro-four-profile-0",
        one := tmp_path / "results" / "beijing_metro-four-profile-0",
    )
    assert readme_tables(tmp_path / "results").startswith("`profile`, the same few sources, 1 to 2 seeds:\n")
    shutil.rmtree(one)
    page = tmp_path / "README.md"
    page.write_text("above\n<!-- tables -->\nold\n<!-- end of tables -->\nbelow\n")
    write_tables(page, tables)
    assert page.read_text() == f"above\n<!-- tables -->\n{tables}<!-- end of tables -->\nbelow\n"
    settings = json.loads((folder / "config.json").read_text())
    settings["settings"]["data"]["support_days"] += 1
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="hangzhou_metro-four-profile-1 differ in settings"):
        readme_tables(tmp_path / "results")
    page.write_text("no marks")
    with pytest.raises(InputError, match="has no place for the tables"):
        write_tables(page, tables)


def test_a_figure_is_drawn_of_lines_and_its_help_needs_none(tmp_path):
    command = [sys.executable, "-m", "benchmarks.harvest_figure"]
    lines = "benchmarks/results/harvest_amd_epyc_2_cores.jsonl"
    assert subprocess.run([*command, "--help"], capture_output=True, check=True).stdout
    subprocess.run([*command, lines, str(tmp_path / "x.svg")], check=True)
    assert (tmp_path / "x.svg").read_text().startswith("<?xml")
    one = subprocess.run([*command, lines], capture_output=True, text=True)
    assert (one.returncode, one.stderr) == (2, "error: got 1 files; name two, that of JSON lines and the figure\n")


def test_without_a_minute_the_tables_are_made_of_what_is_there_and_no_run_begins(finished, tmp_path):
    folder = tmp_path / "results" / "hangzhou_metro-four-profile-0"
    folder.mkdir(parents=True)
    for name in ("config.json", "metrics.json"):
        shutil.copy(finished[0] / name, folder)
    page = tmp_path / "README.md"
    page.write_text("<!-- tables -->\n<!-- end of tables -->\n")
    words = {"data_dir": tmp_path, "out_dir": tmp_path / "runs", "results": folder.parent, "readme": page, "minutes": 0}
    command = [sys.executable, "-m", "benchmarks.tables", *(f"--{name}={value}" for name, value in words.items())]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(said.stdout)["case"].startswith("0_of_")
    assert not (tmp_path / "runs").exists()
    assert readme_tables(folder.parent) in page.read_text()
