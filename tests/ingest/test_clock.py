"""In: times as tables write them. Out: local wall times and the hours of clock changes, by hand."""

import numpy as np
import pandas as pd
import pytest

from gpdiff_jax.errors import InputError
from gpdiff_jax.ingest.clock import local_times, skipped_steps

# In Berlin, 2024, clocks went from 2 to 3 h on 31 March and from 3 back to 2 h on 27 October.


def _column(*texts: str) -> pd.Series:
    return pd.Series(texts, name="ds", dtype="string")


def _walls(*texts: str) -> np.ndarray:
    return np.array(texts, "datetime64[s]")


def test_times_without_an_offset_are_local():
    made = local_times(_column("2024-10-27 01:00", "2024-10-27T02:00:30", "2024-10-28"))
    np.testing.assert_array_equal(made.wall, _walls("2024-10-27T01:00", "2024-10-27T02:00:30", "2024-10-28"))
    assert not made.repeated.any() and not made.second.any()
    zoned = local_times(_column("2024-10-27 01:00", "2024-10-27 02:30"), time_zone="Europe/Berlin")
    np.testing.assert_array_equal(zoned.repeated, [False, True])
    assert not zoned.second.any()  # one row cannot tell


def test_times_with_offsets_are_converted_or_taken_as_written():
    column = _column("2024-10-27T00:00Z", "2024-10-27T01:00Z", "2024-10-27T04:00+02:00")
    made = local_times(column, time_zone="Europe/Berlin")
    np.testing.assert_array_equal(made.wall, _walls("2024-10-27T02:00", "2024-10-27T02:00", "2024-10-27T03:00"))
    np.testing.assert_array_equal(made.repeated, [True, True, False])
    np.testing.assert_array_equal(made.second, [False, True, False])
    written = local_times(_column("2024-10-27T02:00+02:00", "2024-10-27T02:00+01:00", "2024-10-27T03:00+01:00"))
    np.testing.assert_array_equal(written.wall, _walls("2024-10-27T02:00", "2024-10-27T02:00", "2024-10-27T03:00"))
    np.testing.assert_array_equal(written.repeated, [True, True, False])
    np.testing.assert_array_equal(written.second, [False, True, False])


def test_datetimes_of_a_parquet_file_are_read_as_text_is():
    texts = ["2024-10-27T00:00Z", "2024-10-27T01:00Z", "2024-10-27T02:00Z"]
    stamps = pd.Series(pd.to_datetime(texts), name="ds")
    for one, other in zip(
        local_times(stamps, time_zone="Europe/Berlin"),
        local_times(_column(*texts), time_zone="Europe/Berlin"),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    naive = pd.Series(pd.to_datetime(["2024-10-27T05:00"]), name="ds")
    np.testing.assert_array_equal(local_times(naive).wall, _walls("2024-10-27T05:00"))


def test_a_format_reads_days_before_months():
    made = local_times(_column("03/02/2024 14:05"), time_format="%d/%m/%Y %H:%M")
    np.testing.assert_array_equal(made.wall, _walls("2024-02-03T14:05"))
    aware = local_times(_column("03/02/2024 14:05 +0100"), time_format="%d/%m/%Y %H:%M %z")
    np.testing.assert_array_equal(aware.wall, _walls("2024-02-03T14:05"))


def test_the_hour_that_a_clock_change_skips():
    steps = np.datetime64("2024-03-31T00:00", "m") + np.arange(5) * np.timedelta64(60, "m")
    np.testing.assert_array_equal(skipped_steps(steps, "Europe/Berlin"), [False, False, True, False, False])
    assert not skipped_steps(steps, "Asia/Shanghai").any()


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["2024-01-01T00:00", "yesterday"], {}, r"time 'yesterday' \(row 2\) in column 'ds' cannot be read"),
        (["2024-01-01T00:00", "31/01/2024"], {}, r"time '31/01/2024' \(row 2\).*--time_format"),
        (["2024-01-01T00:00Z", "2024-01-01T01:00"], {}, r"'2024-01-01T01:00' \(row 2\).*has no offset"),
        (["2024-01-01T00:00Z"], {}, r"times in column 'ds' are in UTC, as '2024-01-01T00:00Z'.*--time_zone UTC where"),
        (["2024-01-01T00:00"], {"time_zone": "Berlin"}, r"`time_zone` \(='Berlin'\) is unknown; name one of the IANA"),
        (["2024-01-01T00:00", None], {}, "row 2 has no time in column 'ds'"),
    ],
)
def test_times_that_cannot_be_read_are_named(texts, options, message):
    with pytest.raises(InputError, match=message):
        local_times(pd.Series(texts, name="ds", dtype="string"), **options)


@pytest.mark.parametrize(
    ("text", "time_format"),
    [
        ("08/03 00:00", "%d/%m %H:%M"),
        ("12:30", "%H:%M"),
        ("065 12", "%j %H"),
        ("2024-03", "%Y-%m"),
        ("2024 12:30 +0100", "%Y %H:%M %z"),
    ],
)
def test_a_format_that_leaves_a_day_open_is_refused_or_its_year_would_be_1900(text, time_format):
    with pytest.raises(InputError, match=r"`time_format` \(='%.*\) does not tell year, month and day; write the times"):
        local_times(_column(text), time_format=time_format)


@pytest.mark.parametrize(
    ("text", "time_format"),
    [("2024-065", "%Y-%j"), ("5 Mar 24", "%d %b %y"), ("Tue 05.03.2024", "%a %d.%m.%Y")],
)
def test_a_format_may_tell_the_day_in_any_way(text, time_format):
    np.testing.assert_array_equal(local_times(_column(text), time_format=time_format).wall, _walls("2024-03-05T00:00"))


def test_numbers_are_no_times():
    with pytest.raises(InputError, match=r"time \(=1704067200\) in column 'ds' is a number; write ISO times"):
        local_times(pd.Series([1704067200], name="ds"))
    # Nor where some are missing, in a table whose columns are named in another order.
    with pytest.raises(
        InputError, match=r"time '7' \(row 2\) in column 'ds' is a number; .*--columns names region, time"
    ):
        local_times(_column("", "7", "12.5", ""))
    with pytest.raises(InputError, match="row 2 has no time in column 'ds'; give it one"):
        local_times(_column("2024-05-01T12:00", ""))


@pytest.mark.parametrize("texts", [["2024-05-01 12:00:00+02"], ["20240501T120000+0200"], ["2024-05-01T12+02:00"]])
def test_offsets_in_every_iso_form_are_seen(texts):
    made = local_times(_column(*texts))
    np.testing.assert_array_equal(made.wall, _walls("2024-05-01T12:00"))
    left = f"as written, offsets from UTC left aside: '{texts[0]}' is 2024-05-01 12:00:00 on the city's clocks"
    assert made.seen == (("times", left),)
    zoned = local_times(_column(*texts), time_zone="Asia/Shanghai")
    np.testing.assert_array_equal(zoned.wall, _walls("2024-05-01T18:00"))
    assert not zoned.seen


@pytest.mark.parametrize("text", ["2024-05-01T00Z", "20240501T000000Z", "2024-05-01 00:00:00+00"])
def test_utc_in_every_iso_form_asks_for_the_zone(text):
    with pytest.raises(InputError, match="are in UTC"):
        local_times(_column(text))


def test_formats_with_offsets_and_of_numbers():
    z = local_times(_column("2024-05-01T10:00:00Z"), time_format="%Y-%m-%dT%H:%M:%SZ", time_zone="Europe/Berlin")
    np.testing.assert_array_equal(z.wall, _walls("2024-05-01T12:00"))
    bare = local_times(_column("202405011000+0200"), time_format="%Y%m%d%H%M%z")
    np.testing.assert_array_equal(bare.wall, _walls("2024-05-01T10:00"))
    days = local_times(pd.Series([20240501, 20240502], name="ds"), time_format="%Y%m%d")
    np.testing.assert_array_equal(days.wall, _walls("2024-05-01", "2024-05-02"))
    for wrong in ("%Q", "%Y-%m-%", "%d/%d"):
        with pytest.raises(InputError, match="mend --time_format"):
            local_times(_column("2024-05-01"), time_format=wrong)


def test_times_far_from_now_are_named():
    for zone in (None, "Europe/Berlin"):
        with pytest.raises(InputError, match=r"'9999-12-31T23:30' \(row 2\).* outside the years 1900 to 2199"):
            local_times(_column("2024-05-01T00:00", "9999-12-31T23:30"), time_zone=zone)
    with pytest.raises(InputError, match="outside the years 1900 to 2199"):
        local_times(_column("9999-12-31T23:30Z"), time_zone="Europe/Berlin")
