"""In: dates that begin with the day or the month. Out: the days that they are, or one line that says why not."""

import numpy as np
import pandas as pd
import pytest

from gpdiff_jax import ingest
from gpdiff_jax.errors import InputError


def _local(*texts: str):
    return ingest.local_times(pd.Series(texts, name="ds", dtype="string"))


@pytest.mark.parametrize(
    ("texts", "want", "order"),
    [
        # A part above 12 tells.
        (["13/04/2026 10:00", "03/05/2026"], ["2026-04-13T10:00", "2026-05-03"], "day before month"),
        (["04/13/2026 10:00", "05/03/2026"], ["2026-04-13T10:00", "2026-05-03"], "month before day"),
        # Else three days in a row do.
        (["03/04/2026", "04/04/2026", "05/04/2026"], ["2026-04-03", "2026-04-04", "2026-04-05"], "day before month"),
        (["04/03/2026", "04/04/2026", "04/05/2026"], ["2026-04-03", "2026-04-04", "2026-04-05"], "month before day"),
        (["04/04/2026 10:00", "04/04/2026 11:00"], ["2026-04-04T10:00", "2026-04-04T11:00"], "day before month"),
        # As spreadsheets write them.
        (["31.12.2025 9:05", "1.1.2026 23:05:30"], ["2025-12-31T09:05", "2026-01-01T23:05:30"], "day before month"),
        (["31-12-2025T09", "1-1-2026, 10:00"], ["2025-12-31T09:00", "2026-01-01T10:00"], "day before month"),
        (["5/13/2026 12:30 AM", "5/13/2026 12:30 PM"], ["2026-05-13T00:30", "2026-05-13T12:30"], "month before day"),
        (["5/13/2026 1:00 pm"], ["2026-05-13T13:00"], "month before day"),
        (["13/05/2026 10:00+02:00"], ["2026-05-13T10:00"], "day before month"),
    ],
)
def test_the_column_tells_the_order_of_day_and_month(texts, want, order):
    made = _local(*texts)
    np.testing.assert_array_equal(made.wall, np.array(want, "datetime64[s]"))
    assert made.seen[0][0] == "dates" and made.seen[0][1].startswith(f"{order}: {texts[0]!r} is {want[0][:10]}")


def test_iso_dates_are_as_they_are():
    made = _local("2026-04-03T10:00", "2026-4-3", "2026/04/03 11:00")
    np.testing.assert_array_equal(
        made.wall, np.array(["2026-04-03T10", "2026-04-03", "2026-04-03T11"], "datetime64[s]")
    )
    assert not made.seen


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["03/04/2026 10:00", "03/04/2026 11:00"], "'03/04/2026 10:00' may have the day or the month first"),
        (["03/04/2026", "05/06/2026"], "'03/04/2026' may have"),
        (["01/02/2026", "02/01/2026"], "'01/02/2026' may have"),
        (
            ["13/04/2026", "04/14/2026"],
            "day before the month, as '13/04/2026', others the month first, as '04/14/2026'",
        ),
        (["31/02/2026", "13/01/2026"], r"'31/02/2026' \(row 1\) in column 'ds' cannot be read"),
        (["5/13/2026 13:00 PM"], r"'5/13/2026 13:00 PM' \(row 1\) in column 'ds' cannot be read"),
        (["13/04/26 10:00"], r"'13/04/26 10:00' \(row 1\) in column 'ds' cannot be read"),
        (["2026-04-13", "14/04/2026"], r"'14/04/2026' \(row 2\) in column 'ds' cannot be read"),
    ],
)
def test_dates_that_do_not_tell_are_refused(texts, said):
    with pytest.raises(InputError, match=said) as e:
        _local(*texts)
    assert "--time_format" in str(e.value) and "\n" not in str(e.value)


def test_a_city_that_began_three_days_ago_is_of_those_days_and_the_table_says_so(tmp_path):
    rows = [
        f"{name};0{day}/04/2026 {hour:02}:00;{hour},5\n" for name in "ab" for day in (3, 4, 5) for hour in range(24)
    ]
    (tmp_path / "counts.csv").write_text("unique_id;ds;y\n" + "".join(rows))
    (tmp_path / "sites.csv").write_text("unique_id,latitude,longitude\na,1,2\nb,1,3\n")
    given = {"name": "x", "kind": "crowd", "sites": tmp_path / "sites.csv"}
    city, facts = ingest.city_from_tables(tmp_path / "counts.csv", **given)
    assert city.start == np.datetime64("2026-04-03T00:00", "m") and city.num_steps == 72
    assert facts.seen[0] == ("dates", "day before month: '03/04/2026 00:00' is 2026-04-03T00:00")
    assert any(line.startswith("dates ") and "day before month" in line for line in ingest.fact_lines(facts))
    (tmp_path / "counts.csv").write_text("unique_id;ds;y\n" + "".join(row for row in rows if ";03/" in row))
    with pytest.raises(InputError, match=r"counts\.csv: the time '03/04/2026 00:00' may .* write ISO dates"):
        ingest.city_from_tables(tmp_path / "counts.csv", **given)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (
            ["13/04/2026", "14/04/2026", "total"],
            r"'total' \(row 3\) in column 'ds' is no date, as '13/04/2026' and most",
        ),
        (["13.4.20266", "14.4.2026", "15.4.2026"], r"'13.4.20266' \(row 1\) in column 'ds' is no date, as '14.4.2026'"),
    ],
)
def test_the_one_that_is_no_date_among_many_is_named(texts, said):
    with pytest.raises(InputError, match=said):
        _local(*texts)
