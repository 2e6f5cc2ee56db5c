"""In: a finished run.
Out: the sections of its page that hold figures, each as HTML, with a remark where a file is absent.
"""

import datetime
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpdiff_jax.report import canvas, figures, layout, markup
from gpdiff_jax.report.markup import escape, method_label
from gpdiff_jax.report.results import Forecasts, Results

_WEEK_HOURS = 7 * 24
_QUANTILES = (("A good region", 0.1), ("A median region", 0.5), ("A bad region", 0.9))
_STAGES = {
    "pooled": ("The pooled model", ("train_loss", "validation_loss")),
    "harvest": ("Harvest, region by region", ("start_validation_loss", "validation_loss")),
    "pretrain": ("The diffusion model", ("loss", "token_loss", "functional_loss", "validation_loss")),
    "mlp": ("The MLP hypernetwork", ("loss", "token_loss", "functional_loss", "validation_loss")),
    "adapt": ("Fine-tuning on the support days", ("validation_loss",)),
}


def all_sections(results: Results) -> list[str]:
    """Returns the sections in the page's order.

    Args:
      results: a finished run.

    Returns:
      One `<section>` element each.
    """
    return [
        _section("Error by horizon", _horizon(results)),
        _section("Forecast against truth", _weeks(results)),
        _section("Where it works", _places(results)),
        _section("Training", _training(results)),
        _section("Parameters, harvested and generated", _parameters(results)),
    ]


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _horizon(results: Results) -> str:
    methods, ahead = (results.metrics["methods"], results.metrics.get("horizon_minutes") or [])
    ranked = markup.ranked_methods(methods)
    hourly = bool(ahead) and all(minutes % 60 == 0 for minutes in ahead)
    x = np.array(ahead, np.float64) / (60 if hourly else 1)
    drawn = []
    for key, label in (("mae", "Mean absolute error"), ("rmse", "Root mean squared error")):
        curves = []
        for name in ranked:
            values = methods[name].get(key)
            if isinstance(values, list) and len(values) == len(x) and any(map(markup.is_number, values)):
                y = np.array([value if markup.is_number(value) else np.nan for value in values], np.float64)
                curves.append(figures.Curve(method_label(name), x, y, markup.role_of(name, ranked)))
        if curves:
            unit = markup.unit_of(results.metrics)
            drawing = figures.horizon_figure(
                curves,
                name=f"horizon-{key}",
                x_label="hours ahead" if hourly else "minutes ahead",
                y_label=f"{label}, {unit}",
                alt=f"{label} of {len(curves)} methods against the time ahead; the smallest is {curves[0].label}.",
            )
            drawn.append(markup.figure(drawing, f"{label} at every step ahead, over all regions and test windows."))
    if not drawn:
        return markup.missing("no method has errors by horizon")
    roles = {markup.role_of(name, ranked): method_label(name) for name in reversed(ranked)}
    entries = [
        (role, "every other method" if role == "other" else roles[role]) for role in canvas.ROLES if role in roles
    ]
    return f"{markup.keys(entries)}<div class='figures'>{''.join(drawn)}</div>"


def _weeks(results: Results) -> str:
    forecasts = results.forecasts
    if forecasts is None:
        return markup.missing(results.problems["forecasts.npz"])
    method = _chosen_method(forecasts.means)
    if method is None or not len(forecasts.window_start):
        return markup.missing("forecasts.npz holds no forecast")
    relative = _relative_errors(forecasts, method)
    order = np.flatnonzero(np.isfinite(relative))
    if not len(order):
        return markup.missing("no region was observed in the test period")
    order = order[np.argsort(relative[order], kind="stable")]
    track = _Track(forecasts, results.metrics.get("horizon_minutes") or [])
    unit = markup.unit_of(results.metrics)
    parts = [
        f"<p>Three regions over a week of the test period, chosen by the error of {escape(method_label(method))} "
        "relative to the region's mean: the tenth, the fiftieth and the ninetieth of a hundred. "
        f"{escape(track.words)}{' Weekends are shaded.' if track.weekend_days else ''}</p>",
        markup.keys(
            [("ink", "truth"), ("few-shot", method_label(method))]
            + (
                [("band", "two standard deviations between the samples, no interval for the truth")]
                if method in forecasts.spreads
                else []
            )
        ),
    ]
    for number, (title, quantile) in enumerate(_QUANTILES):
        region = int(order[round(quantile * (len(order) - 1))])
        spread = forecasts.spreads.get(method)
        node = forecasts.node_ids[region]
        drawing = figures.week_figure(
            track.hours,
            track.follow(forecasts.truth, region),
            np.where(track.city_observed, track.follow(forecasts.means[method], region), np.nan),
            None if spread is None else track.follow(spread, region),
            day_labels=track.day_labels,
            weekend_days=track.weekend_days,
            name=f"week-{number}",
            y_label=unit,
            alt=f"{title}, {node}: a week of truth and forecast.",
        )
        caption = f"{title}, {node}: the mean absolute error is {100 * relative[region]:.0f} % of its mean."
        parts.append(markup.figure(drawing, caption, "wide"))
    return "".join(parts)


class _Track:
    """Follows one forecast per time through the overlapping windows of the test period, for a week."""

    def __init__(self, forecasts: Forecasts, horizon_minutes: Sequence[float | int]) -> None:
        steps = forecasts.truth.shape[2]
        interval = float(horizon_minutes[0]) if horizon_minutes else 60.0
        starts, first_day = _start_minutes(forecasts.window_start, interval)
        order = np.argsort(starts, kind="stable")
        strides = np.diff(starts[order])
        if len(strides) and np.median(strides) <= interval:
            # Windows start at every step: one lead time for all, the hardest.
            self._windows, self._leads = order, np.full(len(order), steps - 1)
            ahead = markup.format_minutes(steps * interval)
            self.words = f"Every point was forecast {ahead} ahead."
        else:
            kept = [int(order[0])]
            for window in order[1:]:
                if starts[window] >= starts[kept[-1]] + steps * interval:
                    kept.append(int(window))
            self._windows = np.repeat(kept, steps)
            self._leads = np.tile(np.arange(steps), len(kept))
            self.words = "Each window's forecast follows the one before it, so a point is one to all steps ahead."
        hours = (starts[self._windows] + self._leads * interval) / 60.0
        inside = hours < 24.0 * (hours[0] // 24) + _WEEK_HOURS
        # A pause between windows breaks the lines: one empty point after each.
        hours, self._windows, self._leads = (hours[inside], self._windows[inside], self._leads[inside])
        self._breaks = np.flatnonzero(np.diff(hours) * 60.0 > 1.5 * interval) + 1
        self.hours = np.insert(hours, self._breaks, hours[self._breaks - 1] + interval / 120.0)
        observed = np.asarray(np.isfinite(forecasts.truth).any(axis=1))[self._windows, self._leads]
        self.city_observed = np.insert(observed, self._breaks, False)
        days = range(int(self.hours[-1] // 24) + 1)
        if first_day is None:
            self.day_labels, self.weekend_days = [f"day {day + 1}" for day in days], []
        else:
            dates = [first_day + datetime.timedelta(days=day) for day in days]
            self.day_labels = [f"{date:%a} {date.day} {date:%b}" for date in dates]
            self.weekend_days = [day for day in days if dates[day].weekday() >= 5]

    def follow(self, values: np.ndarray, region: int) -> np.ndarray:
        """Returns [S, R, P] values of one region along the track, NaN at the breaks."""
        return np.insert(values[self._windows, region, self._leads].astype(np.float64), self._breaks, np.nan)


def _start_minutes(window_start: Sequence[str], interval: float) -> tuple[np.ndarray, datetime.date | None]:
    """Returns the windows' starts in minutes since the first day's midnight, and that day if the calendar is known."""
    try:
        times = [datetime.datetime.fromisoformat(text) for text in window_start]
    except ValueError:
        digits = ["".join(c for c in text if c.isdecimal()) for text in window_start]
        numbers = np.array([int(text) if text else place for place, text in enumerate(digits)], np.float64)
        return (numbers - numbers.min()) * interval, None
    midnight = min(times).replace(hour=0, minute=0, second=0, microsecond=0)
    return np.array([(time - midnight).total_seconds() / 60.0 for time in times]), midnight.date()


def _relative_errors(forecasts: Forecasts, method: str) -> np.ndarray:
    """Returns each region's absolute error over its absolute truth, both summed; NaN where that says nothing."""
    observed = np.isfinite(forecasts.truth)
    error = np.where(observed, np.abs(forecasts.means[method] - forecasts.truth), 0.0).sum(
        axis=(0, 2), dtype=np.float64
    )
    size = np.where(observed, np.abs(forecasts.truth), 0.0).sum(axis=(0, 2), dtype=np.float64)
    return np.where(size > 0, error / np.where(size > 0, size, 1.0), np.nan)


def _chosen_method(names: Mapping[str, Any]) -> str | None:
    return "gpdiff_few_shot" if "gpdiff_few_shot" in names else next(iter(sorted(names)), None)


def _places(results: Results) -> str:
    if results.regions is None:
        return markup.missing(results.problems["regions.csv"])
    rows = results.regions
    channels = list(dict.fromkeys(row["channel"] for row in rows))
    errors: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row["channel"] == channels[0] and row["mae"] is not None:
            errors[row["method"]][row["region"]] = row["mae"]
    # The forecasts name every region in the order of the map; the table alone must do where they are absent.
    regions = list(results.forecasts.node_ids if results.forecasts else dict.fromkeys(row["region"] for row in rows))
    ranked = markup.ranked_methods(results.metrics["methods"])
    method = _chosen_method({name: None for name in ranked if markup.is_ours(name)})
    if method is None or not regions:
        return markup.missing("regions.csv holds no error of GPDiff")
    rival = markup.best_baseline(ranked)
    remark = f" Of several channels, this is {channels[0]}." if len(channels) > 1 else ""
    parts = [f"<p>The error of {escape(method_label(method))} in every region.{escape(remark)}</p>"]
    parts.append(_maps(results, regions, errors, method, rival))
    shown = [
        name for name in dict.fromkeys((method, "gpdiff_zero_shot", rival, "historical_average")) if name in errors
    ]
    parts.append(_region_table(rows, channels[0], errors, shown))
    return "".join(parts)


def _maps(
    results: Results, regions: list[str], errors: Mapping[str, Mapping[str, float]], method: str, rival: str | None
) -> str:
    atlas = results.atlas
    if atlas is None:
        return markup.missing(results.problems["report.npz"])
    edges, located = (atlas.edges, atlas.coordinates is not None and len(atlas.coordinates) == len(regions))
    if len(edges) and edges.max() >= len(regions):
        return markup.missing(f"report.npz and regions.csv differ in the number of regions ({len(regions)})")
    if located and atlas.coordinates is not None:
        positions, words = (layout.project_coordinates(atlas.coordinates), "on the map, north is up")
    else:
        positions, words = (
            layout.graph_layout(edges, len(regions)),
            "laid out by the graph alone, as places are unknown",
        )
    unit = markup.unit_of(results.metrics)
    own = np.array([errors[method].get(region, np.nan) for region in regions])
    drawn = [
        markup.figure(
            figures.map_figure(
                positions,
                edges,
                own,
                diverging=False,
                name="map-error",
                bar_label=f"Mean absolute error, {unit}",
                alt=f"Map of {len(regions)} regions coloured by the error of {method_label(method)}.",
            ),
            f"{method_label(method)}: mean absolute error per region, {words}. Rings: nothing observed.",
        )
    ]
    if rival is not None and rival in errors:
        other = np.array([errors[rival].get(region, np.nan) for region in regions])
        change = 100.0 * np.where(other > 0, own / np.where(other > 0, other, 1.0) - 1.0, np.nan)
        known = np.isfinite(change)
        wins = int((change[known] < 0).sum())
        drawn.append(
            markup.figure(
                figures.map_figure(
                    positions,
                    edges,
                    change,
                    diverging=True,
                    name="map-change",
                    bar_label="Error against the baseline, % (teal: GPDiff is better)",
                    alt=f"Map of the regions coloured by how GPDiff compares with {method_label(rival)}.",
                ),
                f"Against the best baseline, {method_label(rival)}: GPDiff has the smaller error in {wins} of "
                f"{int(known.sum())} regions.",
            )
        )
    return f"<div class='figures'>{''.join(drawn)}</div>"


def _region_table(
    rows: Sequence[Mapping[str, Any]], channel: str, errors: Mapping[str, Mapping[str, float]], shown: Sequence[str]
) -> str:
    facts = {row["region"]: row for row in rows if row["channel"] == channel}
    first = errors[shown[0]]
    lines = []
    for region in sorted(facts, key=lambda region: -first.get(region, -1.0)):
        cells = [markup.cell(errors[name].get(region), ".2f") for name in shown]
        seen = markup.cell(facts[region]["observations"], ".0f")
        name, note = escape(region), escape(facts[region]["note"])
        lines.append(
            f'<tr><th scope="row" data-value="{name}">{name}</th>{"".join(cells)}{seen}'
            f'<td class="words" data-value="{note}">{note}</td></tr>'
        )
    head = ["Region", *map(method_label, shown), "Observations", "Note"]
    body = markup.table(head, lines, "Mean absolute error of every region", box="tall")
    return f"<details><summary>Every region, the largest error first</summary>{body}</details>"


def _training(results: Results) -> str:
    if results.log is None:
        return markup.missing(results.problems["log.jsonl"])
    drawn = []
    for stage, (title, metrics) in _STAGES.items():
        records = [record for record in results.log if record.get("stage") == stage]
        if stage == "adapt":
            curves = _adapt_curves(records)
        else:
            curves = [_curve(records, metric, metric.replace("_", " ")) for metric in metrics]
        curves = [curve for curve in curves if len(curve.x)]
        if not curves:
            continue
        caption = f"{title}: {', '.join(curve.label for curve in curves)}."
        if stage == "adapt":
            caption = f"{title}: GPDiff and the best others, each at the learning rate that served it best."
        drawing = figures.loss_figure(
            curves,
            name=f"loss-{stage}",
            title=title,
            x_label="regions done" if stage == "harvest" else "step",
            alt=f"Losses over the steps of stage {stage}.",
        )
        drawn.append(markup.figure(drawing, caption))
    if not drawn:
        return markup.missing("log.jsonl holds no losses")
    return f"<div class='figures'>{''.join(drawn)}</div>"


def _curve(records: Sequence[Mapping[str, Any]], metric: str, label: str, role: str = "other") -> figures.Curve:
    """Returns a metric over the steps; several records of one step (a resumed run, several chunks) are averaged."""
    values: dict[float, list[float]] = defaultdict(list)
    for record in records:
        step, value = record.get("chunk", record.get("step")), record.get(metric)
        if isinstance(step, int) and isinstance(value, (int, float)) and markup.is_number(value):
            values[float(step)].append(float(value))
    x = sorted(values)
    return figures.Curve(label, np.array(x), np.array([np.mean(values[step]) for step in x]), role)


def _adapt_curves(records: Sequence[Mapping[str, Any]]) -> list[figures.Curve]:
    runs: dict[str, dict[Any, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        runs[str(record.get("method", "all methods"))][str(record.get("learning_rate"))].append(record)
    curves = []
    for method, by_rate in runs.items():
        role = "few-shot" if markup.is_ours(method) else "other"
        tried = [_curve(found, "validation_loss", method_label(method), role) for found in by_rate.values()]
        tried = [curve for curve in tried if len(curve.x)]
        if tried:
            curves.append(min(tried, key=lambda curve: float(curve.y.min())))
    # A legend of twenty lines helps nobody: ours, and the best of the rest.
    curves.sort(key=lambda curve: (curve.role == "other", float(curve.y.min())))
    return curves[:7]


def _parameters(results: Results) -> str:
    atlas = results.atlas
    if atlas is None:
        return markup.missing(results.problems["report.npz"])
    if not len(atlas.zoo_projection):
        return markup.missing("nothing was generated in this run")
    cities = np.array(atlas.zoo_city)
    zoo = {str(city): atlas.zoo_projection[cities == city] for city in dict.fromkeys(atlas.zoo_city)}
    share = 100 * sum(atlas.projection_variance)
    drawing = figures.projection_figure(
        zoo,
        atlas.generated_projection,
        atlas.pooled_projection if len(atlas.pooled_projection) else None,
        atlas.projection_variance,
        name="parameters",
        alt=f"Scatter of the parameters of {len(zoo)} source cities and of the generated ones on two components.",
    )
    caption = (
        "Each point is one forecaster's parameters, seen along the two directions in which the harvested ones differ "
        f"most ({share:.0f} % of their variance). Generated ones should lie among the harvested, neither in one spot "
        "nor outside."
    )
    return markup.figure(drawing, caption, "middling")
