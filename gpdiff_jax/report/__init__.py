"""In: an output folder of `transfer`. Out: report.html in it, one self-contained page of tables and figures."""

import os
import pathlib


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


__all__ = ["render_report"]
