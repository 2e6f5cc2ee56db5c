"""In: an output folder of `transfer`, or a city's next hours. Out: one self-contained page of tables and figures."""

import os
import pathlib
from collections.abc import Sequence

from gpdiff_jax.cities import City
from gpdiff_jax.transfer.next_hours import NextHours


def render_report(run_dir: str | os.PathLike[str]) -> pathlib.Path:
    """Writes report.html into a run folder, from its other files alone.

    Args:
      run_dir: an output folder of `transfer`; only metrics.json must be there, the page says what else is missing.

    Returns:
      The page's path. It appears whole or not at all, and is the same for the same files.

    Raises:
      InputError: metrics.json is absent or broken.

    Example:
      >>> import gpdiff_jax as gpd
      >>> gpd.render_report("runs/hangzhou")  # doctest: +SKIP
    """
    # matplotlib takes half a second, which only those pay who draw.
    from gpdiff_jax.report import page

    return page.write_report(run_dir)


def render_next(
    path: str | os.PathLike[str], city: City, made: NextHours, *, notes: Sequence[str] = ()
) -> pathlib.Path:
    """Writes the page of a city's next hours: a map of what is coming, the busiest regions, a table of all.

    Args:
      path: the file; what it holds is replaced.
      city: one channel, at the interval of the forecasts or one that divides it; they begin where its series ends or
        later.
      made: its next hours.
      notes: lines of plain text that a reader should know of, as regions that are out of order.

    Returns:
      The path. The page needs no other file; it appears whole or not at all.

    Raises:
      InputError: the folder of the page does not exist; or the forecasts are of other regions, or begin before the
        city's series ends.

    Example:
      >>> import gpdiff_jax as gpd
      >>> gpd.render_next("next.html", city, gpd.forecast_next(parameters, city))  # doctest: +SKIP
    """
    from gpdiff_jax.report import next_page

    return next_page.write_next_page(pathlib.Path(path), city, made, notes)


__all__ = ["render_next", "render_report"]
