"""In: numbers, and rows of cells. Out: the lines of a table of plain text."""

from collections.abc import Sequence

import numpy as np


def in_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells, the first of each to the left, the others to the right, columns as wide as they need be."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) if number else cell.ljust(width) for number, (cell, width) in enumerate(pairs))
        for pairs in (zip(row, widths, strict=True) for row in rows)
    ]


def short_number(value: float | np.floating, least: float = 0.0) -> str:
    """Three digits of a number, all of those before the point, and no exponent: 1806, 54.2, 0.0312; 0 below `least`."""
    if abs(value) < least:
        return "0"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return np.format_float_positional(value, 3, unique=False, fractional=False, trim="-")
