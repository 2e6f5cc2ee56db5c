"""In: arrays of errors, forecasts, losses and positions.
Out: figures as inline SVG text whose colours are the page's CSS variables, so that they follow light and dark.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import matplotlib
import matplotlib.colors
import matplotlib.figure
import matplotlib.ticker
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes

from gpdiff_jax.report.canvas import (
    BETTER_WORSE,
    CATEGORIES,
    INK,
    MARKERS,
    MUTED,
    RASTER_POINTS,
    ROLE_COLOURS,
    ROLES,
    SHADE,
    STYLE,
    as_svg,
    new_figure,
    shorten,
    thin,
)


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line of a figure."""

    label: str
    x: Float[np.ndarray, " M"]
    y: Float[np.ndarray, " M"]  # NaN breaks the line
    role: str = "other"


def horizon_figure(curves: Sequence[Curve], *, name: str, x_label: str, y_label: str, alt: str) -> str:
    """Draws error against the horizon: the named roles in colour with a label at their end, the others in grey.

    Args:
      curves: x is the time ahead, y the error.
      name: what makes the figure's ids unique on its page.
      x_label: words with the unit.
      y_label: words with the unit.
      alt: what the figure shows, for readers who do not see it.

    Returns:
      An `<svg>` element.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(480, 300, left=46, right=150, top=22, bottom=40)
        for curve in sorted(curves, key=lambda curve: -ROLES.index(curve.role)):
            other = curve.role == "other"
            axes.plot(
                curve.x,
                curve.y,
                color=ROLE_COLOURS[curve.role],
                linewidth=1.0 if other else 2.4,
                marker=None if other else "o",
                markersize=4.5,
                zorder=2 if other else 4,
            )
        _label_ends(axes, [curve for curve in curves if curve.role != "other" and np.isfinite(curve.y[-1:]).all()])
        axes.set_xlabel(x_label)
        axes.set_title(y_label, loc="left", fontsize=11, color=MUTED)
        if curves and len(curves[0].x) <= 12:
            axes.set_xticks(curves[0].x)
        axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        return as_svg(figure, name, alt)


def week_figure(
    hours: Float[np.ndarray, "M"],
    truth: Float[np.ndarray, "M"],
    forecast: Float[np.ndarray, "M"],
    spread: Float[np.ndarray, "M"] | None,
    *,
    day_labels: Sequence[str],
    weekend_days: Sequence[int],
    name: str,
    y_label: str,
    alt: str,
) -> str:
    """Draws a region's forecast over its truth, with a band of two standard deviations of the samples.

    Args:
      hours: hours since the midnight at which the first day begins, rising.
      truth: the readings; NaN = missing.
      forecast: the forecasts; NaN breaks the line.
      spread: standard deviation of the samples, or None.
      day_labels: a word for every day.
      weekend_days: the numbers of the days to shade.
      name: as in `horizon_figure`.
      y_label: the unit.
      alt: as in `horizon_figure`.

    Returns:
      An `<svg>` element.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(980, 200, left=46, right=12, top=22, bottom=26)
        for day in weekend_days:
            axes.axvspan(24.0 * day, 24.0 * (day + 1), color=SHADE, linewidth=0, zorder=0)
        if spread is not None:
            low, high = forecast - 2 * spread, forecast + 2 * spread
            if np.nanmin(truth, initial=np.inf) >= 0:
                low = np.maximum(low, 0.0)
            axes.fill_between(hours, low, high, color=ROLE_COLOURS["few-shot"], alpha=0.22, linewidth=0, zorder=2)
        axes.plot(hours, truth, color=INK, linewidth=1.3, zorder=3)
        axes.plot(hours, forecast, color=ROLE_COLOURS["few-shot"], linewidth=1.8, zorder=4)
        days = np.arange(len(day_labels))
        axes.set_xlim(24.0 * int(hours[0] // 24), 24.0 * len(day_labels))
        axes.set_xticks(24.0 * days + 12, day_labels)
        axes.set_xticks(24.0 * np.arange(len(day_labels) + 1), minor=True)
        axes.tick_params(axis="x", which="major", length=0)
        axes.tick_params(axis="x", which="minor", length=4)
        axes.set_xlim(24.0 * int(hours[0] // 24), 24.0 * len(day_labels))
        axes.set_title(y_label, loc="left", fontsize=11, color=MUTED)
        return as_svg(figure, name, alt)


def next_figure(
    hours: Float[np.ndarray, "M"],
    read: Float[np.ndarray, "D"],
    forecast: Float[np.ndarray, "P"],
    quantiles: Float[np.ndarray, "P Q"] | None,
    *,
    labels: Sequence[tuple[float, str]],
    name: str,
    y_label: str,
    alt: str,
) -> str:
    """Draws what a region read and what comes, with bands between the outer and the inner quantiles.

    Args:
      hours: M = D + P, hours since now of the readings and then of the forecasts.
      read: the readings; NaN = missing.
      forecast: the forecasts.
      quantiles: Q an odd number, in order; None draws no band.
      labels: places on the axis, in hours since now, and words for them.
      name: as in `horizon_figure`.
      y_label: the unit.
      alt: as in `horizon_figure`.

    Returns:
      An `<svg>` element.
    """
    ahead, colour = hours[len(read) :], ROLE_COLOURS["few-shot"]
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(480, 200, left=52, right=12, top=22, bottom=26)
        for low in range(0 if quantiles is None else quantiles.shape[1] // 2):
            assert quantiles is not None
            edges = quantiles[:, low], quantiles[:, -1 - low]
            axes.fill_between(ahead, *edges, color=colour, alpha=0.22, linewidth=0, zorder=2)
        axes.axvline(ahead[0] - (hours[1] - hours[0]) / 2, color=MUTED, linewidth=0.8, linestyle=":", zorder=1)
        # A reading between two missing ones would be a line of no length.
        axes.plot(hours[: len(read)], read, color=INK, linewidth=1.5, marker=".", markersize=3, zorder=3)
        axes.plot(ahead, forecast, color=colour, linewidth=2.0, marker="o", markersize=3.5, zorder=4)
        axes.set_xticks([place for place, _ in labels], [words for _, words in labels])
        axes.set_xlim(hours[0], hours[-1])
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]) if np.nanmin(read, initial=np.inf) < 0 else 0.0)
        axes.set_title(y_label, loc="left", fontsize=11, color=MUTED)
        return as_svg(figure, name, alt)


def map_figure(
    positions: Float[np.ndarray, "R 2"],
    edges: Int[np.ndarray, "edges 2"],
    values: Float[np.ndarray, "R"],
    *,
    diverging: bool,
    name: str,
    bar_label: str,
    alt: str,
) -> str:
    """Draws a value per region on the city's map.

    Args:
      positions: x to the right, y upwards, in one unit of length.
      edges: pairs of regions.
      values: one per region; NaN = none, drawn as an empty ring.
      diverging: colours on both sides of zero (below it is better), else from small to large.
      name: as in `horizon_figure`.
      bar_label: what the colour bar shows, with the unit.
      alt: as in `horizon_figure`.

    Returns:
      An `<svg>` element.
    """
    known = np.isfinite(values)
    limits = np.percentile(values[known], [2, 98]) if known.any() else np.array([0.0, 1.0])
    if diverging:
        limits = np.array([-1.0, 1.0]) * max(np.abs(limits).max(), 1e-9)
    elif limits[0] == limits[1]:
        limits = limits + np.array([-0.5, 0.5])
    norm = matplotlib.colors.Normalize(float(limits[0]), float(limits[1]))
    colours = BETTER_WORSE if diverging else matplotlib.colormaps["cividis"]
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(480, 440, left=4, right=4, top=4, bottom=54)
        axes.set_axis_off()
        segments = positions[edges] if len(edges) else np.zeros((0, 2, 2))
        # One path with gaps: hundreds of separate lines would make the page heavy.
        gaps = np.full((len(segments), 1, 2), np.nan)
        path = np.concatenate([segments, gaps], axis=1).reshape(-1, 2)
        axes.plot(path[:, 0], path[:, 1], color=MUTED, linewidth=0.7, alpha=0.45, zorder=1)
        size = float(np.clip(9000.0 / max(len(values), 1), 14.0, 110.0))
        raster = len(values) > RASTER_POINTS
        axes.scatter(*positions[~known].T, s=size, facecolors="none", edgecolors=MUTED, linewidths=1.0, zorder=2)
        # The extremes last, on top of their neighbours.
        order = np.flatnonzero(known)[np.argsort(np.abs(values[known]), kind="stable")]
        axes.scatter(
            *positions[order].T,
            s=size,
            c=values[order],
            cmap=colours,
            norm=norm,
            edgecolors=MUTED,
            linewidths=0.6,
            zorder=3,
            rasterized=raster,
        )
        axes.set_aspect("equal", adjustable="datalim")
        axes.margins(0.06)
        bar = figure.add_axes((0.06, 32 / 440, 0.88, 8 / 440))
        steps = np.linspace(limits[0], limits[1], 65)
        bar.pcolormesh(steps, [0, 1], steps[None, :-1], cmap=colours, edgecolors="face", linewidth=0.3)
        bar.set_yticks([])
        bar.spines["bottom"].set_visible(False)
        bar.grid(False)
        bar.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
        bar.set_title(bar_label, loc="left", fontsize=10.5, color=MUTED, pad=4)
        return as_svg(figure, name, alt)


def loss_figure(curves: Sequence[Curve], *, name: str, title: str, x_label: str, alt: str) -> str:
    """Draws the losses of one stage, on a logarithmic axis where they span more than a factor of three.

    Args:
      curves: x is the step, y the loss.
      name: as in `horizon_figure`.
      title: the stage.
      x_label: what a step is.
      alt: as in `horizon_figure`.

    Returns:
      An `<svg>` element.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(440, 270, left=50, right=12, top=26, bottom=40)
        # Vermilion is too near the colour of the few-shot role.
        lines = [colour for colour in CATEGORIES if colour != "#d55e00"]
        for number, curve in enumerate(curves):
            x, y = thin(curve.x, curve.y)
            colour = lines[number % len(lines)] if curve.role == "other" else ROLE_COLOURS[curve.role]
            marker = "o" if len(x) <= 12 else None
            axes.plot(x, y, color=colour, linewidth=1.7, marker=marker, markersize=4, label=curve.label)
        values = np.concatenate([curve.y[np.isfinite(curve.y)] for curve in curves]) if curves else np.zeros(0)
        if len(values) and values.min() > 0 and values.max() > 3 * values.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
            axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
        axes.set_xlabel(x_label)
        axes.set_title(title, loc="left", fontsize=12, color=INK, fontweight="bold")
        if len(curves) > 1:
            axes.legend(loc="best", handlelength=1.4)
        return as_svg(figure, name, alt)


def projection_figure(
    zoo: Mapping[str, Float[np.ndarray, "M 2"]],
    generated: Float[np.ndarray, "G 2"],
    pooled: Float[np.ndarray, "1 2"] | None,
    variance: Sequence[float],
    *,
    name: str,
    alt: str,
    own_label: str = "generated",
    marks: Sequence[tuple[str, float, float]] = (),
) -> str:
    """Draws the points of each city or class in a colour, those in question as open diamonds, the pooled model as a
    cross.

    Args:
      zoo: the projected parameters (or prompts) of each source city, or of each class.
      generated: those of the target's regions.
      pooled: that of the pooled model, or None.
      variance: the share of variance that each of the two axes holds.
      name: as in `horizon_figure`.
      alt: as in `horizon_figure`.
      own_label: what the diamonds are.
      marks: letters beside some points, with their places.

    Returns:
      An `<svg>` element.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(620, 420, left=60, right=170, top=12, bottom=44)
        axes.grid(True, axis="both")
        raster = sum(len(points) for points in zoo.values()) > RASTER_POINTS
        for number, (city, points) in enumerate(zoo.items()):
            axes.scatter(
                *points.T,
                s=16,
                color=CATEGORIES[number % len(CATEGORIES)],
                marker=MARKERS[(number + number // len(CATEGORIES)) % len(MARKERS)],
                alpha=0.75,
                linewidths=0,
                label=shorten(city, 22),
                rasterized=raster,
            )
        axes.scatter(
            *generated.T,
            s=24,
            facecolors="none",
            edgecolors=INK,
            marker="D",
            linewidths=1.0,
            label=shorten(own_label, 22),
        )
        for letter, x, y in marks:
            place = {"xytext": (5, 4), "textcoords": "offset points"}
            axes.annotate(letter, (x, y), color=INK, fontweight="bold", fontsize=12, zorder=6, **place)
        if pooled is not None:
            axes.scatter(*pooled.T, s=90, color=INK, marker="x", linewidths=2.6, label="pooled", zorder=5)
        axes.set_xlabel(f"component 1 ({100 * variance[0]:.0f} % of the variance)")
        axes.set_ylabel(f"component 2 ({100 * variance[1]:.0f} %)")
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6))
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), handletextpad=0.3, labelspacing=0.7, markerscale=1.4)
        return as_svg(figure, name, alt)


def _label_ends(axes: Axes, curves: Sequence[Curve]) -> None:
    """Writes each curve's label beside its end, pushed apart where they would overlap."""
    if not curves:
        return
    low, high = axes.get_ylim()
    gap = (high - low) / 17
    curves = sorted(curves, key=lambda curve: curve.y[-1])
    places = [float(curve.y[-1]) for curve in curves]
    for _ in range(60):
        for lower in range(len(places) - 1):
            overlap = gap - (places[lower + 1] - places[lower])
            if overlap > 0:
                places[lower] -= overlap / 2
                places[lower + 1] += overlap / 2
    for curve, place in zip(curves, places, strict=True):
        axes.annotate(
            shorten(curve.label, 25),
            (float(curve.x[-1]), place),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=10.5,
            fontweight="bold" if curve.role == "few-shot" else "normal",
            color=ROLE_COLOURS[curve.role],
            annotation_clip=False,
        )
