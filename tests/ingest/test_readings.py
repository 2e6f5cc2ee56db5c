"""In: tables of readings in files. Out: the readings at regular steps, by hand."""

import numpy as np
import pandas as pd
import pytest

from gpdiff_jax.errors import InputError
from gpdiff_jax.ingest.readings import read_rows
from gpdiff_jax.ingest.steps import grid

_LONG = """unique_id,ds,y
north,2024-05-01T02:00,5
south,2024-05-01T00:00,1
north,2024-05-01T00:00,3
south,2024-05-01T01:00,
north,2024-05-01T03:00,6
"""
_WIDE = """ds,north,south
2024-05-01T00:00,3,1
2024-05-01T02:00,5,nan
2024-05-01T03:00,6,
"""
_HOURS = np.array([[3, 1], [np.nan, np.nan], [5, np.nan], [6, np.nan]], np.float32)


def _write(tmp_path, text, name="table.csv"):
    path = tmp_path / name
    path.write_text(text)
    return path


def _gridded(tmp_path, text, *, counts=True, zone=None, **options):
    return grid(read_rows(_write(tmp_path, text), time_zone=zone), counts=counts, time_zone=zone, **options)


@pytest.mark.parametrize("text", [_LONG, _WIDE])
def test_rows_in_any_order_become_steps_and_absent_ones_are_missing(tmp_path, text):
    made = _gridded(tmp_path, text)
    assert made.ids == ("north", "south") and made.interval_minutes == 60
    assert made.start == np.datetime64("2024-05-01T00:00", "m")
    np.testing.assert_array_equal(made.values, _HOURS)
    assert (made.duplicates, made.moved, made.repeated, made.skipped) == (0, 0, 0, 0)


def test_parquet_and_other_column_names(tmp_path):
    table = pd.read_csv(_write(tmp_path, _LONG)).rename(columns={"unique_id": "station", "ds": "t", "y": "count"})
    path = tmp_path / "table.csv"
    table.to_csv(path, index=False)
    made = grid(read_rows(path, columns=("station", "t", "count")), counts=True)
    np.testing.assert_array_equal(made.values, _HOURS)
    frame = pd.read_csv(_write(tmp_path, _WIDE))
    frame["ds"] = pd.to_datetime(frame["ds"])
    pytest.importorskip("pyarrow")
    frame.to_parquet(tmp_path / "table.parquet")
    np.testing.assert_array_equal(grid(read_rows(tmp_path / "table.parquet"), counts=True).values, _HOURS)


def test_days_that_lack_are_missing_readings(tmp_path):
    text = "unique_id,ds,y\n" + "".join(
        f"a,2024-05-0{day}T{hour:02}:00,{hour}\n" for day in (1, 4) for hour in range(24)
    )
    made = _gridded(tmp_path, text)
    assert made.values.shape == (96, 1) and np.isnan(made.values[24:72]).all()
    np.testing.assert_array_equal(made.values[72:, 0], np.arange(24))


def test_times_that_are_late_move_to_their_step(tmp_path):
    times = ["00:00:04", "00:59:58", "02:00:01", "03:00:00", "04:03:00"]
    text = "unique_id,ds,y\n" + "".join(f"a,2024-05-01T{time},{k}\n" for k, time in enumerate(times))
    made = _gridded(tmp_path, text)
    np.testing.assert_array_equal(made.values[:, 0], [0, 1, 2, 3, 4])
    assert made.moved == 4
    # As do those that all lie beside it.
    beside = _gridded(tmp_path, "unique_id,ds,y\na,2024-05-01T00:20,1\na,2024-05-01T01:20,2\na,2024-05-01T03:20,3\n")
    assert beside.start == np.datetime64("2024-05-01T00:00", "m") and beside.moved == 3
    np.testing.assert_array_equal(beside.values[:, 0], [1, 2, np.nan, 3])


@pytest.mark.parametrize(("counts", "want"), [(True, [6, 4]), (False, [2, 4])])
def test_times_anywhere_are_binned(tmp_path, counts, want):
    times = ["00:01", "00:13", "00:50", "01:25"]
    text = "unique_id,ds,y\n" + "".join(f"a,2024-05-01T{time},{k + 1}\n" for k, time in enumerate(times))
    made = _gridded(tmp_path, text, counts=counts, interval_minutes=60)
    np.testing.assert_array_equal(made.values[:, 0], want)


def test_an_interval_of_the_table_that_divides_the_wanted_one_is_kept(tmp_path):
    text = "unique_id,ds,y\n" + "".join(f"a,2024-05-01T{k // 4:02}:{15 * (k % 4):02},{k}\n" for k in range(8))
    made = _gridded(tmp_path, text, interval_minutes=60)
    assert made.interval_minutes == 15
    np.testing.assert_array_equal(made.values[:, 0], np.arange(8))


@pytest.mark.parametrize("aware", [True, False])
@pytest.mark.parametrize("counts", [True, False])
def test_the_hour_that_a_clock_change_repeats_is_halved_or_averaged(tmp_path, aware, counts):
    local = [("01:00", "+02:00"), ("02:00", "+02:00"), ("02:00", "+01:00"), ("03:00", "+01:00")]
    rows = [f"a,2024-10-27T{time}{offset if aware else ''},{2 * k}\n" for k, (time, offset) in enumerate(local)]
    made = _gridded(tmp_path, "unique_id,ds,y\n" + "".join(rows), counts=counts, zone="Europe/Berlin")
    np.testing.assert_array_equal(made.values[:, 0], [0, 3, 6])  # two hours' sum of 2 and 4, halved, is their mean
    assert made.repeated == 1 and made.duplicates == 0


def test_a_repeated_hour_that_was_read_once_holds_that_reading_and_is_not_counted(tmp_path):
    rows = [f"a,2024-10-27T{time},{k}\n" for k, time in enumerate(("01:00+02:00", "02:00+01:00", "03:00+01:00"))]
    made = _gridded(tmp_path, "unique_id,ds,y\n" + "".join(rows), zone="Europe/Berlin")
    np.testing.assert_array_equal(made.values[:, 0], [0, 1, 2])
    assert made.repeated == 0


def test_quarters_of_a_repeated_hour_are_told_apart_by_their_order(tmp_path):
    walls = [f"02:{15 * k:02}" for k in range(4)]
    rows = [f"a,2024-10-27T{wall},{k}\n" for k, wall in enumerate(["01:45", *walls, *walls, "03:00"])]
    made = _gridded(tmp_path, "unique_id,ds,y\n" + "".join(rows), zone="Europe/Berlin")
    np.testing.assert_array_equal(made.values[:, 0], [0, 3, 4, 5, 6, 9])
    assert made.repeated == 4


def test_the_hour_that_a_clock_change_skips_is_missing_and_counted(tmp_path):
    rows = [f"a,2024-03-31T0{hour}:00,{hour}\n" for hour in (0, 1, 3, 4)]
    made = _gridded(tmp_path, "unique_id,ds,y\n" + "".join(rows), zone="Europe/Berlin")
    np.testing.assert_array_equal(made.values[:, 0], [0, 1, np.nan, 3, 4])
    assert made.skipped == 1


def test_a_reading_in_the_hour_that_a_clock_change_skips_is_missing_and_said(tmp_path):
    rows = [f"2024-03-31T0{hour}:00,{hour},{hour}\n" for hour in range(5)]
    made = _gridded(tmp_path, "ds,a,b\n" + "".join(rows), zone="Europe/Berlin")
    np.testing.assert_array_equal(made.values[:, 1], [0, 1, np.nan, 3, 4])
    (name, said), *_ = made.seen
    assert name == "clocks" and made.skipped == 1
    assert said.startswith("2 readings at times that the clocks of Europe/Berlin skip are missing, the first at 2024-")
    assert "02:00:00 (row 4); if the counters' clocks are not put forward" in said
    # On clocks that are never put forward, and where the zone is not known, they are readings like others.
    for zone in ("Etc/GMT-1", None):
        whole = _gridded(tmp_path, "ds,a,b\n" + "".join(rows), zone=zone)
        np.testing.assert_array_equal(whole.values[:, 1], [0, 1, 2, 3, 4])
        assert whole.seen == ()
    # A reading of several hours, or a day, that begins within the skipped one is of what came after it.
    rows = [f"2024-03-31T{hour:02}:00,{hour}\n" for hour in range(0, 10, 2)]
    made = _gridded(tmp_path, "ds,a\n" + "".join(rows), zone="Europe/Berlin")
    assert made.interval_minutes == 120 and made.seen == () and made.skipped == 0
    np.testing.assert_array_equal(made.values[:, 0], [0, 2, 4, 6, 8])
    rows = [f"2024-04-{day},{day}\n" for day in range(22, 31)]
    made = _gridded(tmp_path, "ds,a\n" + "".join(rows), zone="Africa/Cairo")
    assert made.seen == () and made.values[:, 0].tolist() == list(range(22, 31))


def test_dates_that_may_be_mistyped_are_said_with_their_row(tmp_path):
    rows = [f"2024-05-01T{hour:02}:00,{hour}\n" for hour in range(24)]
    assert _gridded(tmp_path, "ds,a\n" + "".join(rows)).seen == ()
    rows[20] = "2062-05-01T20:00,20\n"
    seen = dict(_gridded(tmp_path, "ds,a\n" + "".join(rows)).seen)
    assert seen["hole"].startswith("no row between 2024-05-01T23:00:00 and 2062-05-01T20:00:00 (row 22), 13879 days; ")
    assert seen["ahead"].startswith("1 times lie after today, the first 2062-05-01T20:00:00 (row 22); ")


@pytest.mark.parametrize(("how", "want"), [("sum", 7), ("mean", 3.5), ("last", 3)])
def test_duplicates_are_refused_or_combined(tmp_path, how, want):
    text = "unique_id,ds,y\na,2024-05-01T00:00,4\na,2024-05-01T01:00,1\na,2024-05-01T00:00,3\na,2024-05-01T00:00,\n"
    made = _gridded(tmp_path, text, duplicates=how)
    np.testing.assert_array_equal(made.values[:, 0], [want, 1])
    assert made.duplicates == 2
    with pytest.raises(
        InputError, match=r"region 'a' has several readings at 2024-05-01T00:00:00 \(row 4\) and 1 more rows.*--dup"
    ):
        _gridded(tmp_path, text)
    with pytest.raises(InputError, match=r"`duplicates` must be one of refuse, sum, mean, last, got 'first'"):
        _gridded(tmp_path, text, duplicates="first")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unique_id,ds,y\na,2024-05-01T00:00,many\n", r"reading 'many' \(row 2, column 'y'\) is no number"),
        ("unique_id,ds,y\na,2024-05-01T00:00,inf\n", r"reading 'inf' \(row 2, column 'y'\) is no number"),
        ("unique_id,ds,y\n,2024-05-01T00:00,1\n", "row 2 names no region in column 'unique_id'"),
        (
            "station,hour,y\na,2024-05-01T00:00,1\n",
            r"columns station, hour, y, and the first is no time; a long one needs .*--columns",
        ),
        ("ds\n2024-05-01T00:00\n", r"the table has the columns ds; a long one needs unique_id, ds, y"),
        ("unique_id,ds,y\n", "holds no row"),
        ("unique_id,ds,y\na,2024-05-01T00:00,\na,2024-05-01T01:00,\n", "not one reading"),
        ("unique_id,ds,y\na,2024-05-01T00:00,1\n", "no interval can be seen"),
        (
            "unique_id,ds,y\na,2024-05-01T00:00,1\na,2024-05-01T00:07,1\n",
            "7 minutes apart, which does not divide a day",
        ),
        (
            "unique_id,ds,y\na,1024-05-01T00:00,1\na,2024-05-01T00:01,1\n",
            r"'1024-05-01T00:00' \(row 2\).* outside the years 1900",
        ),
    ],
)
def test_tables_that_are_wrong_are_named(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as said:
        _gridded(tmp_path, text)
    assert str(said.value).startswith(str(tmp_path / "table.csv")) and "\n" not in str(said.value)


def test_a_file_that_is_none_or_damaged_is_named(tmp_path):
    with pytest.raises(InputError, match="is no file; check the path"):
        read_rows(tmp_path / "none.csv")
    with pytest.raises(InputError, match="cannot be read as csv"):
        read_rows(_write(tmp_path, 'unique_id,ds,y\n"a,2024\n'))


def _rows(*pairs: tuple[str, float], region: str = "a") -> str:
    return "".join(f"{region},{time},{value}\n" for time, value in pairs)


@pytest.mark.parametrize("zone", ["Europe/Berlin", None])
def test_the_repeated_hour_is_seen_where_times_are_a_little_late(tmp_path, zone):
    offsets = ("", "", "", "") if zone else ("+02:00", "+02:00", "+01:00", "+01:00")
    times = [
        f"2024-10-27T{time}{offset}"
        for time, offset in zip(("01:00:01", "02:00:01", "02:00:02", "03:00:00"), offsets, strict=True)
    ]
    text = "unique_id,ds,y\n" + _rows(*((time, 10) for time in times))
    made = _gridded(tmp_path, text, zone=zone)
    np.testing.assert_array_equal(made.values[:, 0], [10, 10, 10])
    assert made.repeated == 1 and made.duplicates == 0


def test_two_rows_of_the_first_time_of_a_repeated_hour_are_duplicates_where_the_table_tells(tmp_path):
    times = ("01:00+02:00", "02:00+02:00", "02:00+02:00", "02:00+01:00", "03:00+01:00")
    text = "unique_id,ds,y\n" + _rows(*((f"2024-10-27T{time}", k) for k, time in enumerate(times)))
    with pytest.raises(InputError, match=r"several readings at 2024-10-27T02:00:00 \(row 4\); say"):
        _gridded(tmp_path, text, zone="Europe/Berlin")
    made = _gridded(tmp_path, text, zone="Europe/Berlin", duplicates="last")
    np.testing.assert_array_equal(made.values[:, 0], [0, (2 + 3) / 2, 4])


@pytest.mark.parametrize("counts", [True, False])
def test_only_the_repeated_hour_of_a_longer_bin_counts_by_half(tmp_path, counts):
    # Every 7 minutes, which is no interval of a day, in UTC; one day of 25 hours.
    moments = np.datetime64("2024-10-25T22:00", "m") + np.arange(0, 3 * 1440 + 60, 7) * np.timedelta64(1, "m")
    local = [str(moment) + "Z" for moment in moments]
    back = np.datetime64("2024-10-27T01:00", "m")  # from 2 h on the second time
    values = np.where((moments >= back) & (moments < back + np.timedelta64(60, "m")), 40.0, 100.0)
    text = "unique_id,ds,y\n" + _rows(*zip(local, values, strict=True))
    made = _gridded(tmp_path, text, counts=counts, zone="Europe/Berlin", interval_minutes=180)
    # The bin from 0 to 3 h of the 27th: 22 to 24 h, 0 to 1 h and 1 to 2 h in UTC.
    first = back - np.timedelta64(3, "h")
    hours = [
        values[(moments >= first + k * np.timedelta64(1, "h")) & (moments < first + (k + 1) * np.timedelta64(1, "h"))]
        for k in range(4)
    ]
    weights = [1.0, 1.0, 0.5, 0.5]
    total = sum(weight * hour.sum() for weight, hour in zip(weights, hours, strict=True))
    number = sum(weight * len(hour) for weight, hour in zip(weights, hours, strict=True))
    at = int((np.datetime64("2024-10-27T00:00") - np.datetime64(made.start)) / np.timedelta64(180, "m"))
    np.testing.assert_allclose(made.values[at, 0], total if counts else total / number, rtol=1e-6)
    assert np.nanmax(np.abs(np.diff(made.values[1:-1, 0]))) < (800 if counts else 20)  # no bin is halved whole


def test_stamps_that_move_to_a_step_that_is_read_are_duplicates(tmp_path):
    text = "unique_id,ds,y\n" + _rows(
        *((f"2024-05-01T{hour:02}:00:00", 10) for hour in range(24)), ("2024-05-01T03:00:05", 10)
    )
    with pytest.raises(InputError, match="region 'a' has several readings at 2024-05-01T03:00:05"):
        _gridded(tmp_path, text)


@pytest.mark.parametrize(("clock", "hours"), [("13:00", 24), ("23:59", 24), ("00:00", 24)])
def test_a_daily_reading_belongs_to_its_day_whenever_it_is_read(tmp_path, clock, hours):
    text = "unique_id,ds,y\n" + _rows(*((f"2024-05-0{day}T{clock}", day) for day in range(1, 5)))
    made = _gridded(tmp_path, text)
    assert made.interval_minutes == 60 * hours and made.start == np.datetime64("2024-05-01T00:00")
    np.testing.assert_array_equal(made.values[:, 0], [1, 2, 3, 4])


def test_every_region_has_steps_of_its_own_lateness(tmp_path):
    times = [f"{hour:02}" for hour in range(10)]
    text = "unique_id,ds,y\n" + "".join(
        _rows(*((f"2024-05-01T{hour}:{minute}", int(hour)) for hour in times), region=name)
        for name, minute in (("a", "00"), ("b", "30"), ("c", "45"), ("d", "00"))
    )
    made = _gridded(tmp_path, text)
    np.testing.assert_array_equal(made.values, np.repeat(np.arange(10), 4).reshape(10, 4))


def test_an_interval_that_the_table_cannot_give_is_refused(tmp_path):
    text = "unique_id,ds,y\n" + _rows(*((f"2024-05-01T00:{minute}0", 10) for minute in range(6)))
    with pytest.raises(InputError, match=r"10 minutes apart, and `interval_minutes` \(=15\) is no multiple"):
        _gridded(tmp_path, text, interval_minutes=15)
    with pytest.raises(InputError, match="no multiple"):
        _gridded(tmp_path, text, interval_minutes=5)
    odd = [str(np.datetime64("2024-05-01T00:00:00") + np.timedelta64(90 * k, "s")) for k in range(20)]
    odd = "unique_id,ds,y\n" + _rows(*((time, 1) for time in odd))
    with pytest.raises(InputError, match="no interval can be seen"):
        _gridded(tmp_path, odd)
    np.testing.assert_array_equal(_gridded(tmp_path, odd, interval_minutes=15).values[:, 0], [10, 10])


def test_a_time_far_from_all_others_is_said_before_memory_is_asked_for(tmp_path):
    late = "".join(_rows(("2199-05-01T00:00", 1), region=f"r{k}") for k in range(50))
    text = "unique_id,ds,y\n" + _rows(("2024-05-01T00:00", 1), ("2024-05-01T00:01", 1), ("2024-05-01T00:02", 1)) + late
    with pytest.raises(
        InputError, match=r"from 2024-05-01T00:00:00 to 2199-05-01T00:00:00, .* steps of 1 minutes for 51 regions"
    ):
        _gridded(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ds,north,north\n2024-05-01T00:00,1,2\n", "has two columns 'north'; rename one"),
        ("unique_id,ds,y,y\na,2024-05-01T00:00,1,2\n", "has two columns 'y'"),
        ("ds,n,s\n2024-05-01T00:00,2000,0,\n", "cannot be read as csv .*Expected 3 fields"),
        (
            "time,station,count\n" + "2024-05-01T00:00,101,3\n2024-05-01T00:00,102,3\n" * 3,
            "come several times, as in a long",
        ),
        ("station,time,count\n101,2024-05-01T00:00,3\n", "the first is no time; a long one needs .*--columns"),
        ("ds,a,,b\n2024-05-01T00:00,1,2,3\n", "one of them without a name"),
    ],
)
def test_columns_that_would_be_misread_are_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read_rows(_write(tmp_path, text))


def test_names_of_columns_that_a_wide_table_lacks_are_refused(tmp_path):
    path = _write(tmp_path, _WIDE)
    with pytest.raises(InputError, match=r"and --columns \(=site,hour,count\) names none of them; name"):
        read_rows(path, columns=("site", "hour", "count"))
    assert read_rows(path, columns=("site", "ds", "count")).ids == ("north", "south")


def test_a_format_that_a_wide_table_is_not_written_in_is_named(tmp_path):
    path = _write(tmp_path, "Zeit,north,south\n13.04.2026 10:00,1,2\n13.04.2026 11:00,3,4\n")
    words = r"of which 'Zeit' is not written as --time_format \(='%d/%m/%Y %H:%M'\) says, and the first is no time"
    with pytest.raises(InputError, match=words):
        read_rows(path, time_format="%d/%m/%Y %H:%M")


def test_row_numbers_without_a_name_are_no_region(tmp_path):
    rows = _WIDE.splitlines()
    text = "\n".join([f",{rows[0]}", *(f"{k},{row}" for k, row in enumerate(rows[1:]))])
    made = grid(read_rows(_write(tmp_path, text)), counts=True)
    assert made.ids == ("north", "south")
    np.testing.assert_array_equal(made.values, _HOURS)


def test_an_index_of_times_in_parquet_is_the_column_of_times(tmp_path):
    pytest.importorskip("pyarrow")
    frame = pd.read_csv(_write(tmp_path, _WIDE), parse_dates=["ds"]).set_index("ds").astype(float)
    frame.to_parquet(tmp_path / "table.parquet")
    np.testing.assert_array_equal(grid(read_rows(tmp_path / "table.parquet"), counts=True).values, _HOURS)
    frame.iloc[0, 0] = np.inf
    frame.to_parquet(tmp_path / "table.parquet")
    with pytest.raises(InputError, match=r"reading inf \(row 1, column 'north'\) is no number"):
        read_rows(tmp_path / "table.parquet")


def test_a_damaged_compressed_file_is_named(tmp_path):
    path = tmp_path / "table.csv.gz"
    pd.read_csv(_write(tmp_path, _LONG)).to_csv(path, index=False)
    assert grid(read_rows(path), counts=True).ids == ("north", "south")
    whole = path.read_bytes()
    for content in (whole[:30], b"\x1f\x8b" + b"x" * 60, b"no gzip"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="cannot be read as gz"):
            read_rows(path)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize(
    ("lines", "row"),
    [
        (["unique_id,ds,y", "a,2024-05-01T00:00,1", "a,2024-05-01T01:00,many"], 3),
        (["", "unique_id,ds,y", "a,2024-05-01T00:00,1", "", "  ", "a,2024-05-01T01:00,many"], 6),
        (["ds,a,b", "2024-05-01T00:00,1,2", "2024-05-01T01:00,1,many"], 3),
        (["ds,a,b", "2024-05-01T00:00,1,2", "", "2024-05-01T25:00,1,2"], 4),
        (["ds,a,b", "2024-05-01T00:00,1,2", "2024-05-01T01:00,1,2", ",1,2"], 4),
        (["ds,a,b", "2024-05-01T00:00Z,1,2", "2024-05-01T01:00,1,2"], 3),
        (["ds,a,b", "2024-05-01T00:00,1,2", "1024-05-01T01:00,1,2"], 3),
        (["ds,a,b", "2024-05-01T00:00,1,2", *(f"2024-05-01T0{hour}:00,1,2" for hour in (1, 2, 3, 4, 5, 1))], 8),
        (["unique_id,ds,y", "a,2024-05-01T00:00,1", ",2024-05-01T01:00,1"], 3),
    ],
)
def test_the_file_and_its_row_are_named(tmp_path, lines, row, separator):
    text = "\n".join(lines).replace(",", separator) + "\n"
    with pytest.raises(InputError) as said:
        _gridded(tmp_path, text)
    assert str(said.value).startswith(f"{tmp_path / 'table.csv'}: ") and "\n" not in str(said.value)
    assert f"row {row}" in str(said.value)
