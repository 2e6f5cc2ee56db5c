"""In: an output folder of `transfer`, its files only.
Out: report.html in it, one self-contained page of words, tables and figures.
"""

import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from gpdiff_jax.files import user_path
from gpdiff_jax.report import markup, sections
from gpdiff_jax.report.document import write_page
from gpdiff_jax.report.markup import escape, method_label
from gpdiff_jax.report.results import Results, read_results

# Key in metrics.json (or "change", against the historical average), heading, format ("" = the table's own decimals).
_COLUMNS = (
    ("mae_mean", "MAE", ""),
    ("change", "Against historical average", "+.1f"),
    ("mae_weekday", "MAE, weekdays", ""),
    ("mae_weekend", "MAE, weekends", ""),
    ("rmse_mean", "RMSE", ""),
    ("rmse_weekday", "RMSE, weekdays", ""),
    ("rmse_weekend", "RMSE, weekends", ""),
    ("learning_rate", "Learning rate", "g"),
    ("steps", "Steps", "g"),
    ("validation_mae", "Validation MAE", ""),
    ("seconds", "Seconds", ".1f"),
    ("training_seconds", "Seconds, sources", ".1f"),
)


def write_report(run_dir: str | os.PathLike[str]) -> pathlib.Path:
    """See `gpdiff_jax.report.render_report`."""
    run_dir = user_path(run_dir)
    results = read_results(run_dir)
    parts = [_header(results), _methods(results), *sections.all_sections(results), _settings(results)]
    return write_page(run_dir / "report.html", f"{results.metrics['target']} – forecast transfer report", parts)


def _header(results: Results) -> str:
    metrics = results.metrics
    unit = markup.unit_of(metrics)
    ranked = markup.ranked_methods(metrics["methods"])
    badges = [("", f"seed {metrics['seed']}")]
    protocol = metrics.get("protocol")
    if protocol == "paper":
        badges.append((' class="warning"', "paper protocol: not leak-free"))
    elif protocol:
        badges.append(("", f"{protocol} protocol"))
    for key, words in (
        ("covariates", "covariates"),
        ("support_days", "support days"),
        ("test_windows", "test windows"),
    ):
        if metrics.get(key) is not None:
            badges.append(("", f"{words}: {metrics[key]}"))
    if metrics.get("sources"):
        badges.append(("", "from " + ", ".join(map(str, metrics["sources"]))))
    items = "".join(f"<li{mark}>{escape(text)}</li>" for mark, text in badges)
    return (
        f'<header><p class="eyebrow">Forecast transfer by generated parameters</p>'
        f"<h1>{escape(metrics['target'])}</h1>"
        f'<p class="lead">{escape(_headline(results))}</p>'
        f'<ul class="badges">{items}</ul>'
        f"{_tiles(metrics['methods'], ranked, unit)}</header>"
    )


def _headline(results: Results) -> str:
    """Says in two or three sentences what was forecast for whom, by what best, and by how much."""
    metrics, unit = results.metrics, markup.unit_of(results.metrics)
    horizon = metrics.get("horizon_minutes") or []
    reach = f"up to {markup.format_minutes(horizon[-1])} ahead " if horizon else ""
    whom = (
        f"for the {metrics['regions']} regions of {metrics['target']}"
        if metrics.get("regions")
        else "for " + metrics["target"]
    )
    days = metrics.get("support_days")
    seen = f", after {days} visible day{'' if days == 1 else 's'}" if days is not None else ""
    opening = f"Forecasts {reach}{whom}{seen}."
    methods = metrics["methods"]
    ranked = markup.ranked_methods(methods)
    if not ranked:
        return f"{opening} No method has an error: nothing was observed in the test period."
    best = ranked[0]
    error = methods[best]["mae_mean"]
    sentence = f"{method_label(best)} is best, with a mean absolute error of {markup.number(error)} {unit}"
    baselines = [name for name in ranked if not markup.is_ours(name)]
    if markup.is_ours(best):
        margins = []
        if baselines:
            rival = baselines[0]
            margins.append(
                f"{markup.percent_apart(error, methods[rival]['mae_mean'])} the best baseline"
                f" ({method_label(rival)}, {markup.number(methods[rival]['mae_mean'])})"
            )
        if "historical_average" in ranked and baselines[:1] != ["historical_average"]:
            past = methods["historical_average"]["mae_mean"]
            margins.append(f"{markup.percent_apart(error, past)} the historical average ({markup.number(past)})")
        return f"{opening} {sentence}{': ' if margins else ''}{' and '.join(margins)}."
    ours = next((name for name in ranked if markup.is_ours(name)), None)
    if ours is None:
        return f"{opening} {sentence}; GPDiff has no result."
    own = methods[ours]["mae_mean"]
    closing = f"{method_label(ours)} is at {markup.number(own)}, {markup.percent_apart(own, error)} it"
    if "historical_average" in ranked and best != "historical_average":
        past = methods["historical_average"]["mae_mean"]
        closing += f" and {markup.percent_apart(own, past)} the historical average ({markup.number(past)})"
    return f"{opening} {sentence}. {closing}."


def _tiles(methods: Mapping[str, Any], ranked: Sequence[str], unit: str) -> str:
    baseline = markup.best_baseline(ranked)
    chosen = [
        ("GPDiff few-shot", "gpdiff_few_shot", "few-shot"),
        ("GPDiff zero-shot", "gpdiff_zero_shot", "zero-shot"),
        (f"Best baseline: {method_label(baseline or '')}", baseline, "baseline"),
    ]
    if baseline != "historical_average":
        chosen.append(("Historical average", "historical_average", "history"))
    tiles = []
    for label, name, role in chosen:
        if name not in ranked:
            continue
        against = "the visible days' mean at the same time of day"
        if name != "historical_average":
            past = methods["historical_average"]["mae_mean"] if "historical_average" in ranked else None
            against = (
                ""
                if past is None
                else f"{markup.percent_apart(methods[name]['mae_mean'], past)} the historical average"
            )
        tiles.append(
            f'<div class="tile" style="--edge: var(--{role})"><div class="name">{escape(label)}</div>'
            f'<div class="figure">{escape(markup.number(methods[name]["mae_mean"]))}</div>'
            f'<div class="note">{escape(unit)}{"<br>" if against else ""}{escape(against)}</div></div>'
        )
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _methods(results: Results) -> str:
    metrics = results.metrics
    parts = [
        "<section><h2>Methods</h2>",
        "<p>Errors on the test period, averaged over the horizon steps; smaller is better. "
        "MAE is the mean absolute error, RMSE the root of the mean squared error, both in "
        f"{escape(markup.unit_of(metrics))}. Every method saw the same days. All that are fine-tuned in codes "
        "take the same steps at the same rate; where there is a validation MAE, rate and steps were chosen by it.</p>",
        _method_table(metrics["methods"], "Errors of every method"),
    ]
    for channel, content in (metrics.get("channels") or {}).items():
        parts.append(f"<h3>Channel {escape(channel)}, in {escape(markup.unit_of({**metrics, **content}))}</h3>")
        parts.append(_method_table(content["methods"], f"Errors of every method, channel {channel}"))
    return "".join([*parts, "</section>"])


def _method_table(methods: Mapping[str, Any], caption: str) -> str:
    ranked = markup.ranked_methods(methods)
    names = [*ranked, *sorted(set(methods) - set(ranked))]
    lowest = methods[ranked[0]]["mae_mean"] if ranked else 1.0
    highest = max((methods[name]["mae_mean"] for name in ranked), default=1.0) or 1.0
    places = max(1, 2 - math.floor(math.log10(lowest))) if lowest > 0 else 3
    values = {name: dict(methods[name]) for name in names}
    past = methods["historical_average"]["mae_mean"] if "historical_average" in ranked else None
    if past:
        for name in ranked:
            values[name]["change"] = 100 * (methods[name]["mae_mean"] / past - 1)
    columns = [column for column in _COLUMNS if any(markup.is_number(values[name].get(column[0])) for name in names)]
    rows = []
    for name in names:
        cells = []
        for key, _, form in columns:
            extra = " %" if key == "change" else ""
            if key == "mae_mean" and name in ranked:
                share, role = (100 * values[name][key] / highest, markup.role_of(name, ranked))
                extra = f'<span class="bar" style="--share: {share:.1f}%; --bar: var(--{role})"></span>'
            cells.append(markup.cell(values[name].get(key), form or f".{places}f", extra))
        kinds = [kind for kind, yes in (("ours", markup.is_ours(name)), ("best", name in ranked[:1])) if yes]
        mark = f' class="{" ".join(kinds)}"' if kinds else ""
        label = escape(method_label(name))
        first = f'<th scope="row" data-value="{label}">{label}</th>'
        rows.append(f'<tr{mark} data-method="{escape(name)}">{first}{"".join(cells)}</tr>')
    return markup.table(["Method", *(heading for _, heading, _ in columns)], rows, caption)


def _settings(results: Results) -> str:
    parts = ["<section><h2>Settings</h2>"]
    silent = results.metrics.get("silent_regions") or []
    if silent:
        named = ", ".join(f"<code>{escape(region)}</code>" for region in silent)
        parts.append(
            f"<h3>Silent regions</h3><p>Without a reading in the support days, generated from the prompts of their "
            f"neighbours ({len(silent)}): {named}.</p>"
        )
    else:
        parts.append("<p>Every region had readings in the support days.</p>")
    if results.config is None:
        parts.append(markup.missing(results.problems["config.json"]))
    else:
        flat: dict[str, Any] = {}
        for key, value in results.config.items():
            if isinstance(value, dict):
                flat.update(
                    {
                        (name if key in ("settings", "flags") else f"{key} · {name}"): item
                        for name, item in value.items()
                    }
                )
            else:
                flat[key] = value
        words = {key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in flat.items()}
        items = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in words.items())
        parts.append(f'<dl class="settings">{items}</dl>')
    return "".join([*parts, "</section>"])
