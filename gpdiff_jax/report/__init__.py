"""In: an output folder of `transfer`. Out: report.html in it, one self-contained page of tables and figures."""

from gpdiff_jax.report.page import render_report

__all__ = ["render_report"]
