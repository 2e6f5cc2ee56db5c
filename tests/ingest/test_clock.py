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
        (["2024-01-01T00:00Z"], {}, r"times are in UTC.*--time_zone"),
        (["2024-01-01T00:00"], {"time_zone": "Berlin"}, r"`time_zone` \(='Berlin'\) is unknown; name one of the IANA"),
        (["2024-01-01T00:00", None], {}, "row 2 has no time in column 'ds'"),
    ],
)
def test_times_that_cannot_be_read_are_named(texts, options, message):
    with pytest.raises(InputError, match=message):
        local_times(pd.Series(texts, name="ds", dtype="string"), **options)


def test_numbers_are_no_times():
    with pytest.raises(InputError, match=r"time \(=1704067200\) in column 'ds' is a number; write ISO times"):
        local_times(pd.Series([1704067200], name="ds"))
