"""In: a simulated city written as tables. Out: the same city, from the shell and from Python; and what was seen."""

import dataclasses
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest

import gpdiff_jax as gpd
from gpdiff_jax import ingest
from gpdiff_jax.errors import InputError


@pytest.fixture(scope="module", name="city")
def _city() -> gpd.City:
    return gpd.simulate_cities(gpd.SimulationConfig(cities=1, regions=6, days=5, interval_minutes=30), seed=3)[0]


@pytest.fixture(name="tables")
def _tables(city, tmp_path):
    times = city.start + np.arange(city.num_steps) * np.timedelta64(30, "m")
    long = pd.DataFrame(
        {
            "unique_id": np.tile(city.node_ids, city.num_steps),
            "ds": np.repeat(times.astype(str), city.num_nodes),
            "y": city.values.reshape(-1),
        }
    )
    long.dropna().sample(frac=1.0, random_state=0).to_csv(tmp_path / "long.csv", index=False)
    wide = pd.DataFrame(city.values[:, :, 0], columns=list(city.node_ids))
    wide.insert(0, "ds", times.astype(str))
    wide.to_csv(tmp_path / "wide.csv", index=False)
    edges = {
        "from": [city.node_ids[node] for node in city.senders],
        "to": [city.node_ids[node] for node in city.receivers],
        "weight": city.weights,
    }
    pd.DataFrame(edges).to_csv(tmp_path / "edges.csv", index=False)
    sites = {"unique_id": city.node_ids, "latitude": city.latitude, "longitude": city.longitude}
    pd.DataFrame(sites).to_csv(tmp_path / "sites.csv", index=False)
    return tmp_path


def test_a_column_of_totals_is_said_and_no_other(tables):
    frame = pd.read_csv(tables / "wide.csv")
    sums = frame.drop(columns="ds").sum(axis=1)
    for column, kind, said in ((sums, "crowd", True), (sums + 7, "crowd", False), (sums + 1, "speed", False)):
        frame.assign(Summe=column).to_csv(tables / "summed.csv", index=False)
        _, facts = ingest.city_from_tables(tables / "summed.csv", name="x", kind=kind, edges=tables / "edges.csv")
        lines = [line for line in ingest.fact_lines(facts) if line.startswith("total")]
        assert len(lines) == said and all("region 'Summe' reads what all others read together" in one for one in lines)


@pytest.mark.parametrize("table", ["long.csv", "wide.csv"])
def test_a_city_comes_back_from_its_tables(city, tables, table):
    rows = ingest.read_rows(tables / table)
    found = ingest.grid(rows, counts=True)
    adjacency = ingest.read_edges(tables / "edges.csv", found.ids)
    sites = ingest.read_sites(tables / "sites.csv", found.ids)
    made, facts = ingest.table_city(found, adjacency, name=city.name, kind="crowd", quantity="visitors", sites=sites)
    order = [made.node_ids.index(name) for name in city.node_ids]
    np.testing.assert_array_equal(made.values[:, order], city.values)
    np.testing.assert_allclose(made.adjacency()[np.ix_(order, order)], city.adjacency(), rtol=1e-6)
    np.testing.assert_allclose(np.asarray(made.latitude)[order], city.latitude, rtol=1e-9)
    assert made.start == city.start and made.interval_minutes == 30 and made.unit == city.unit
    assert facts.missing == np.isnan(city.values).mean() and facts.edges == len(city.senders) and facts.isolated == 0
    hourly, _ = ingest.table_city(
        found, adjacency, name=city.name, kind="crowd", quantity="visitors", interval_minutes=60
    )
    np.testing.assert_array_equal(hourly.values[:, order], gpd.resample(city, 60).values)


def test_zeros_fill_values_and_silent_regions(city):
    values = np.array(city.values[:, :, 0])
    values[0, 0], values[:, 5] = 2147483647.0, 0.0
    found = ingest.Grid(values, city.node_ids, np.datetime64(city.start), 30, 0, 0, 0, 0)
    facts_of: dict[str, Any] = {"name": "x", "kind": "crowd", "quantity": "visitors"}
    with pytest.raises(InputError, match=r"'visitors' of region 'r0' at step 0 .*far beyond.*--missing_above"):
        ingest.table_city(found, city.adjacency(), **facts_of)
    made, facts = ingest.table_city(found, city.adjacency(), missing_above=1e6, zero_is_missing=True, **facts_of)
    assert np.isnan(made.values[0, 0, 0]) and not (made.values == 0).any()
    assert made.node_ids == city.node_ids[:5] and facts.without_reading == ("r5",) and facts.regions == 5
    assert 0.16 < facts.zeros < 0.5
    lines = ingest.fact_lines(facts)
    assert any(line.startswith("left out") and line.endswith("1 region without a reading: r5") for line in lines)
    speeds = dataclasses.replace(gpd.simulate_cities(gpd.SimulationConfig(kind="speed", days=2), seed=0)[0])
    slow = np.array(speeds.values[:, :, 0])
    slow[3, 2] = 0.0
    read = ingest.Grid(slow, speeds.node_ids, np.datetime64(speeds.start), 60, 0, 0, 0, 0)
    kept, _ = ingest.table_city(read, speeds.adjacency(), name="y", kind="speed", quantity="speed_kmh")
    assert np.isnan(kept.values[3, 2, 0])


def test_a_stock_is_averaged_where_counts_add_up(city, tables):
    kinds = {kind: {"name": "x", "kind": kind, "sites": tables / "sites.csv"} for kind in ("crowd", "stock")}
    hourly = ingest.ReadingsConfig(interval_minutes=60)
    counts, parked = (ingest.city_from_tables(tables / "long.csv", config=hourly, **kinds[kind])[0] for kind in kinds)
    whole = np.isfinite(city.values).all(axis=1)[:, 0].reshape(-1, 2).all(axis=1)
    assert whole.any()
    np.testing.assert_allclose(parked.values[whole], counts.values[whole] / 2, rtol=1e-6)
    assert (parked.kind, parked.unit, counts.unit) == ("stock", "available", "visitors per 60 min")


def _prepare(tables, *words):
    command = [sys.executable, "-m", "experiments.prepare_city", *words]
    return subprocess.run(command, cwd=tables, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_writes_a_city_or_says_in_one_line_why_not(city, tables):
    given = ("--readings=long.csv", "--kind=crowd", "--out_file=town.npz")
    made = _prepare(tables, *given, "--sites=sites.csv", "--interval_minutes=60", "--neighbours=2")
    assert made.returncode == 0, made.stderr
    town = gpd.load_city(tables / "town.npz")
    assert town.num_nodes == 6 and town.interval_minutes == 60 and town.latitude is not None
    assert "6 regions" in made.stdout and ", made of steps of 30\n" in made.stdout
    before = (tables / "town.npz").read_bytes()
    (tables / "here.npz").mkdir()
    for wrong, said in (
        (("--sites=sites.csv", "--missing_above=-1"), "`missing_above` must be at least 0, got -1.0"),
        (
            ("--sites=sites.csv", "--interval_minutes=45"),
            "30 minutes apart, and `interval_minutes` (=45) is no multiple",
        ),
        (("--edges=long.csv",), "edges need from and to, and weight"),
        (
            ("--sites=sites.csv", "--readings=town.npz"),
            "--out_file (=town.npz) is --readings, which it would overwrite",
        ),
        (("--matrix=./town.npz",), "--out_file (=town.npz) is --matrix, which it would overwrite"),
        (
            ("--sites=sites.csv", "--out_file=here.npz"),
            "--out_file (=here.npz) is a folder; name a file in it, as here.npz",
        ),
        (("--sites=sites.csv", "--out_file=köln.npz"), "--out_file (=köln.npz) names the city 'köln', and such a name"),
        ((), "nothing says what links the regions; give `sites` (--sites), `edges`"),
        (("--edges=a.csv", "--matrix=b.npy"), "both `edges` (=a.csv) and `matrix` (=b.npy) link the regions"),
        (("--sites=sites.csv", "--distances"), "`distances` (=True) is of `edges` or `matrix`, and neither is given"),
        (("--edges=a.csv", "--neighbours=3"), "`neighbours` (=3) is of `sites` alone"),
        (("--sites=sites.csv", "--channel=1"), "`channel` (=1) says nothing of long.csv, which is a table of one"),
        (("--sites=sites.csv", "--start=unknown", "--time_format=%Y"), "`time_format` (=%Y) says nothing of long.csv"),
    ):
        ended = _prepare(tables, *given, *wrong)
        assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and said in ended.stderr
        assert (tables / "town.npz").read_bytes() == before and not list(tables.glob(".*partial"))
    for missing, said in (
        (1, "--kind is missing; give one of crowd, flow, speed, stock"),
        (0, "--readings is missing"),
    ):
        ended = _prepare(tables, *given[:missing], *given[missing + 1 :])
        assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and said in ended.stderr


@pytest.mark.parametrize(
    ("offset", "zone", "start"),
    [
        ("Z", None, None),
        ("+00:00", None, None),
        ("+02:00", None, "2026-05-01T00:00"),
        ("Z", "UTC", "2026-05-01T00:00"),
        ("Z", "Asia/Shanghai", "2026-05-01T08:00"),
        ("+02:00", "Asia/Shanghai", "2026-05-01T06:00"),
    ],
)
def test_times_in_utc_need_a_zone_and_others_are_the_local_ones(tmp_path, offset, zone, start):
    rows = [
        f"{name},2026-05-0{day}T{hour:02}:00:00{offset},{hour}\n"
        for name in "ab"
        for day in (1, 2, 3)
        for hour in range(24)
    ]
    (tmp_path / "counts.csv").write_text("unique_id,ds,y\n" + "".join(rows))
    (tmp_path / "sites.csv").write_text("unique_id,latitude,longitude\na,1,2\nb,1,3\n")
    given: dict[str, Any] = {"name": "x", "kind": "crowd", "sites": tmp_path / "sites.csv"}
    config = ingest.ReadingsConfig(time_zone=zone)
    if start is None:
        said = rf"counts\.csv: the times .* as '2026-05-01T00:00:00{re.escape(offset)}', .*--time_zone, .*_zone UTC"
        with pytest.raises(InputError, match=said):
            ingest.city_from_tables(tmp_path / "counts.csv", config=config, **given)
        words = ("--readings=counts.csv", "--kind=crowd", "--out_file=town.npz", "--sites=sites.csv")
        ended = _prepare(tmp_path, *words)
        assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and not list(tmp_path.glob("*.npz"))
        assert "as '2026-05-01T00:00:00" in ended.stderr
    else:
        made, facts = ingest.city_from_tables(tmp_path / "counts.csv", config=config, **given)
        assert made.start == np.datetime64(start, "m")
        np.testing.assert_array_equal(made.values[:, 0, 0], np.tile(np.arange(24), 3))
        lines = [line for line in ingest.fact_lines(facts) if line.startswith("times ")]
        assert len(lines) == (zone is None)
        assert all("'2026-05-01T00:00:00+02:00' is 2026-05-01 00:00:00 on" in line for line in lines)


def _hours(reading):
    """A long table of two regions over two days, with a reading of its own for south at three of the second."""
    rows = [("unique_id", "ds", "y")]
    rows += [
        (name, f"2026-05-0{day}T{hour:02}:00", reading if (name, day, hour) == ("south", 2, 3) else "7")
        for name in ("north", "south")
        for day in (1, 2)
        for hour in range(24)
    ]
    return rows, "".join(",".join(row) + "\n" for row in rows)


@pytest.mark.parametrize("kind", ["crowd", "flow", "speed"])
@pytest.mark.parametrize("form", ["long.csv", "wide.csv", "long.parquet", "array.csv", "array.npy"])
def test_a_negative_reading_is_named_by_its_row_and_with_what_to_do_about_it(tmp_path, kind, form):
    rows, text = _hours("-1")
    path = tmp_path / form
    frame = pd.DataFrame(rows[1:], columns=list(rows[0])).astype({"y": float})
    wide = frame.pivot(index="ds", columns="unique_id", values="y")
    where, remedy, start = "of region 'south' at 2026-05-02T03:00", "leave the cell empty", None
    if form == "long.csv":
        path.write_text(text)
        said = "(row 77) "
    elif form == "wide.csv":
        wide.to_csv(path)
        said = "(row 29) "
    elif form == "long.parquet":
        pytest.importorskip("pyarrow")
        frame.to_parquet(path)
        said = "(row 76) "
    else:
        start = "2026-05-01T00:00"
        if form == "array.csv":
            wide.to_csv(path, index=False)
            said = "(row 29) "
        else:
            np.save(path, wide.to_numpy())
            said, where, remedy = "", "of region '1' at 2026-05-02T03:00", "store NaN"
    config = ingest.ReadingsConfig(start=start, interval_minutes=None if start is None else 60)
    (tmp_path / "sites.csv").write_text("unique_id,latitude,longitude\nnorth,1,2\nsouth,1,3\n0,1,2\n1,1,3\n")
    with pytest.raises(InputError) as error:
        ingest.city_from_tables(path, name="x", kind=kind, sites=tmp_path / "sites.csv", config=config)
    assert str(error.value).startswith(f"{path}: the reading -1 {said}{where}")
    assert str(error.value).endswith(f" is negative; where a reading is missing, {remedy}")


@pytest.mark.parametrize(
    ("duplicates", "second", "want"),
    [("sum", "9", 8), ("last", "9", 9), ("mean", "9", None), ("sum", "-3", None), ("last", "-3", None)],
)
def test_a_negative_reading_may_be_corrected_by_a_duplicate(tmp_path, duplicates, second, want):
    (tmp_path / "x.csv").write_text(f"{_hours('-1')[1]}south,2026-05-02T03:00,{second}\n")
    rows = ingest.read_rows(tmp_path / "x.csv")
    if want is not None:
        assert ingest.grid(rows, counts=True, duplicates=duplicates).values[27, 1] == want
    else:
        also = ", as are 1 more" if second == "-3" else ""
        with pytest.raises(InputError, match=rf"reading -1 \(row 77\) of region 'south' .* is negative{also};"):
            ingest.grid(rows, counts=True, duplicates=duplicates)


def test_sites_that_the_readings_have_not_are_named_with_the_regions_without_a_reading(tmp_path):
    (tmp_path / "x.csv").write_text(_hours("7")[1] + "empty,2026-05-01T00:00,\n")
    (tmp_path / "sites.csv").write_text(
        "unique_id,latitude,longitude\nghost,1,2\nnorth,1,2\nempty,1,4\nsouth,1,3\n9,,\n"
    )
    (tmp_path / "edges.csv").write_text("from,to\nnorth,south\n")
    for edges in (None, tmp_path / "edges.csv"):
        city, facts = ingest.city_from_tables(
            tmp_path / "x.csv", name="x", kind="crowd", sites=tmp_path / "sites.csv", edges=edges
        )
        assert city.node_ids == ("north", "south") and facts.without_reading == ("empty", "ghost", "9")
        assert "left out  3 regions without a reading: empty, ghost, 9" in ingest.fact_lines(facts)


def _quarters(tmp_path, kind, **options):
    """Two days of quarters of an hour: one hour of north is read for three of four, one of south for one."""
    values = np.full((192, 2), 6.0)
    values[8, 0], values[20:23, 1], values[39:43, 0], values[100, 1] = np.nan, np.nan, 0, 999
    times = np.datetime64("2026-05-01T00:15", "m") + 15 * np.arange(192)
    frame = pd.DataFrame(values, columns=["north", "south"])
    frame.insert(0, "ds", times.astype(str))
    frame.to_csv(tmp_path / "x.csv", index=False)
    (tmp_path / "sites.csv").write_text("unique_id,latitude,longitude\nnorth,1,2\nsouth,1,3\n")
    config = ingest.ReadingsConfig(interval_minutes=60)
    return ingest.city_from_tables(
        tmp_path / "x.csv", name="x", kind=kind, sites=tmp_path / "sites.csv", config=config, **options
    )


@pytest.mark.parametrize(("kind", "scaled"), [("flow", ", their counts scaled to the full bin"), ("speed", "")])
def test_the_facts_are_those_of_the_city_that_is_written(tmp_path, kind, scaled):
    city, facts = _quarters(tmp_path, kind, missing_above=500.0)
    assert (facts.steps, facts.interval_minutes, facts.first) == (city.num_steps, 60, city.start)
    assert city.start == np.datetime64("2026-05-01T01:00", "m") and city.num_steps == 47
    assert facts.missing == np.isnan(city.values).mean() and facts.table_interval_minutes == 15
    lines = {line[:8].strip(): line[8:].strip() for line in ingest.fact_lines(facts)}
    assert lines["span"] == "2026-05-01T01:00 to 2026-05-02T23:00, 47 steps of 60 minutes, made of steps of 15"
    # By hand: of 47 hours of both, that at 10 of north was a zero of speed throughout.
    total, missing, completed = (94 if kind == "flow" else 93), 1, 2
    assert lines["in part"] == (
        f"of {total} readings of 60 minutes, {missing} were observed for less than half and are missing, "
        f"{completed} for less than all{scaled}"
    )
    first = "the first 999 of region 'south' at 2026-05-02T01:15"
    assert lines["above"] == f"1 readings above 500 are missing, {first}"
    if kind == "flow":
        assert facts.zeros == (city.values == 0).sum() / np.isfinite(city.values).sum()
    else:
        assert lines["zeros"].endswith("of the readings of the tables, taken as missing")


def test_a_limit_that_no_reading_reaches_is_said_to_be_none(tmp_path):
    _, facts = _quarters(tmp_path, "flow", missing_above=1000.0)
    assert any(
        line.startswith("above ") and line.endswith("  no reading is above 1000") for line in ingest.fact_lines(facts)
    )
    unknown = ingest.Grid(np.array([[1, 900], [2, 3]], np.float32), ("a", "b"), None, 60, 0, 0, 0, 0)
    _, facts = ingest.table_city(
        unknown, np.eye(2)[::-1], name="x", kind="flow", quantity="vehicles", missing_above=500.0
    )
    assert facts.above == "1 readings above 500 are missing, the first 900 of region 'b' at step 0"
