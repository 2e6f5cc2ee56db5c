"""What of a new city's forecasts is printed."""

import pytest

from gpdiff_jax.run.columns import in_columns, short_number


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1806.4, "1806"),
        (1.71e5, "171000"),
        (99.96, "100"),
        (54.23, "54.2"),
        (0.0312, "0.0312"),
        (0.0, "0"),
        (-3.456, "-3.46"),
    ],
)
def test_numbers_have_no_exponents(value, shown):
    assert short_number(value) == shown


def test_what_is_below_the_least_is_nothing():
    assert short_number(3e-7, 1e-3) == "0"


def test_cells_of_the_longest_rows_stay_apart():
    rows = [["region", "+60 min"], ["a station", "1806 (1710 to 1930)"], ["b", "5 (0 to 12)"]]
    assert in_columns(rows) == [
        "region                 +60 min",
        "a station  1806 (1710 to 1930)",
        "b                  5 (0 to 12)",
    ]
