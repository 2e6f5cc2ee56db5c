"""In: what an inspection of prompts found, and what they predict.
Out: the parts of a page of pictures and tables, and the same as JSON values.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from gpdiff_jax.analysis.inspection import RANKS, Inspection
from gpdiff_jax.analysis.prediction import ALL_PARTS, ParameterPrediction
from gpdiff_jax.report import figures, markup
from gpdiff_jax.report.markup import escape

_PREDICTORS = {
    "pooled_unchanged": "Pooled model unchanged",
    "zoo_mean": "Mean of the other cities",
    "projection": "Own parameters, projected on the components",
    "own_parameters": "Own parameters",
}
_PARTS = {"statistics": "Statistics", "temporal": "Temporal encoder", "spatial": "Spatial embedding", ALL_PARTS: "All"}


def prompt_parts(
    inspection: Inspection, prediction: ParameterPrediction | None, *, target: str, badges: Sequence[str]
) -> list[str]:
    """Makes what the page shows, for `document.write_page`.

    Args:
      inspection: of the source cities and the target.
      prediction: of the source cities' parameters, or None where there is only one source city.
      target: the target's name.
      badges: facts on the run.

    Returns:
      Finished HTML elements, in order.
    """
    sources = dict.fromkeys(inspection.cities[: inspection.num_sources])
    count = len(inspection.names) - inspection.num_sources
    lead = (
        f"What the prompts say of the {count} regions of {target}, "
        f"beside {inspection.num_sources} regions of {len(sources)} source cit{'y' if len(sources) == 1 else 'ies'}."
    )
    facts = "".join(f"<li>{escape(text)}</li>" for text in (*badges, "from " + ", ".join(sources)))
    header = (
        f'<header><p class="eyebrow">Prompts of regions</p><h1>{escape(target)}</h1><p class="lead">{escape(lead)}</p>'
        f'<ul class="badges">{facts}</ul></header>'
    )
    return [
        header,
        _section("Regions by their prompts", _pictures(inspection, target)),
        _section("The nearest regions across cities", _neighbours(inspection)),
        _section("Do prompts identify regions?", _recall(inspection)),
        _section("Do prompts predict parameters?", _prediction(prediction)),
    ]


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def part_label(part: str) -> str:
    """Returns the name of a part of the prompt, or of what stands beside them, in words."""
    return _PARTS.get(part) or _PREDICTORS.get(part) or part


def _letters(inspection: Inspection) -> dict[int, str]:
    return {row: chr(ord("A") + k % 26) for k, row in enumerate(inspection.neighbours)}


def _pictures(inspection: Inspection, target: str) -> str:
    first, letters = inspection.num_sources, _letters(inspection)
    cities, labels = np.asarray(inspection.cities), np.asarray(inspection.labels)
    body = [
        "<p>Each point is a region, seen through one window, along the two directions in which the source regions' "
        "prompts differ most. Open diamonds are the target's regions. On the left colours are cities: where the target "
        "lies among the sources, it can learn from them. On the right colours are function classes, by how a region's "
        "day differs from that of its city, shared by all cities.</p>"
    ]
    for part, projection in inspection.projections.items():
        places, drawn = projection.places, []
        by_city = {str(city): places[:first][cities[:first] == city] for city in dict.fromkeys(cities[:first].tolist())}
        by_class = {name: places[labels == k] for k, name in enumerate(inspection.class_names) if (labels == k).any()}
        for kind, groups in (("city", by_city), ("function class", by_class)):
            drawing = figures.projection_figure(
                groups,
                places[first:],
                None,
                projection.variance,
                name=f"prompts-{part}-{kind.split()[-1]}",
                alt=f"Scatter of the prompts ({part_label(part)}) of {len(places)} regions, coloured by {kind}.",
                own_label=target,
                marks=[(letter, *places[row]) for row, letter in letters.items()],
            )
            drawn.append(markup.figure(drawing, f"{part_label(part)}, coloured by {kind}."))
        body.append(f"<h3>{escape(part_label(part))}</h3><div class='figures'>{''.join(drawn)}</div>")
    return "".join(body)


def _neighbours(inspection: Inspection) -> str:
    days, letters = inspection.days, _letters(inspection)
    rows_shown = [row for row in inspection.neighbours] + [
        near for found in inspection.neighbours.values() for near, _ in found
    ]
    low, high = float(days[rows_shown].min()), float(days[rows_shown].max())
    rows, most = [], max(len(found) for found in inspection.neighbours.values())
    for row, found in inspection.neighbours.items():
        cells = [_profile(inspection, row, low, high, role="few-shot", note="")]
        for near, distance in found:
            note = f" at {markup.number(distance)}"
            cells.append(_profile(inspection, near, low, high, role="baseline", note=note))
        letter = letters[row]
        rows.append(f'<tr><th scope="row" data-value="{letter}">{letter}</th>{"".join(cells)}</tr>')
    heads = ["In the pictures", "Region of the target", *(f"Nearest source region {k + 1}" for k in range(most))]
    return (
        "<p>Some regions of the target, spread over the picture, and the source regions with the nearest prompts (all "
        "parts, scaled), each with its distance. Each line is a mean day from midnight to midnight over the days that "
        "the prompt was made from, in standard deviations of these days, all on one axis; the hairline is their "
        "mean.</p>" + markup.table(heads, rows, "Regions of the target and the nearest source regions")
    )


def _profile(inspection: Inspection, row: int, low: float, high: float, *, role: str, note: str) -> str:
    name = inspection.names[row]
    line = _sparkline(inspection.days[row], low, high, role=role, alt=f"Mean day of {name}.")
    return f'<td class="profile" data-value="{escape(name)}">{line}{escape(name + note)}</td>'


def _sparkline(values: Float[np.ndarray, " M"], low: float, high: float, *, role: str, alt: str) -> str:
    """A line as small as a word, over a hairline at zero; all that stand side by side share low and high."""
    x = np.linspace(1.0, 119.0, len(values))
    heights = 35.0 - 34.0 * (np.append(values, 0.0) - low) / max(high - low, 1e-9)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, heights[:-1], strict=True))
    return (
        f'<svg class="spark" viewBox="0 0 120 36" role="img" aria-label="{escape(alt)}">'
        f'<path d="M1 {heights[-1]:.1f}H119" stroke="var(--grid)"/>'
        f'<polyline points="{points}" fill="none" stroke="var(--{role})" stroke-width="1.6"/></svg>'
    )


def _recall(inspection: Inspection) -> str:
    if not inspection.recall:
        return markup.missing("no city has two windows without a common step")
    rows = []
    for one in inspection.recall:
        cells = [
            markup.cell(one.days, "g"),
            markup.cell(one.pairs, "d"),
            *(markup.cell(one.found[k], ".3f") for k in RANKS),
        ]
        rows.append(f"<tr>{_first(one.city)}{_words(part_label(one.part))}{''.join(cells)}</tr>")
    heads = ["City", "Part", "Days of a window", "Pairs", *(f"recall@{rank}" for rank in RANKS)]
    return (
        "<p>How often a region's prompt in one window is among the nearest to its own prompt in another window of its "
        "city without a common step: the share of regions found first, and among the first five. Of the target only "
        "the support days are read, so its windows are shorter.</p>"
        + markup.table(heads, rows, "Recall by city and part", box="tall")
    )


def _prediction(prediction: ParameterPrediction | None) -> str:
    if prediction is None:
        return markup.missing("a source city is left out in turn, and this run has only one")
    parts = [
        "<p>Every source city is left out in turn; ridge regression from a part of the prompt, fitted on the other "
        "cities, predicts the leading principal components of its regions' parameters (differences from the pooled "
        "model). R² is the share of the components' variance among the city's regions that is explained, below 0 where "
        "their mean would do better; within the city, it is the share once both means are taken out. MAE is the error "
        "of the forecasts with the predicted parameters on the left-out city's validation windows, in standard "
        "deviations. The pooled model and the encoders of the run were trained on all its source cities, the left-out "
        "one too (the encoders without supervision), so these numbers flatter them.</p>"
    ]
    names = list(dict.fromkeys(one.predictor for one in prediction.predicted))
    rows = []
    for name in names:
        found = [one for one in prediction.predicted if one.predictor == name]
        means = [float(np.mean([getattr(one, key) for one in found])) for key in ("r2", "r2_within", "mae")]
        rows.append(f"<tr>{_first(part_label(name))}{_numbers(*means)}</tr>")
    parts.append(
        "<h3>Mean over the left-out cities</h3>"
        + markup.table(["Predictor", "R²", "R² within the city", "MAE"], rows, "Prediction, mean over cities")
    )
    parts.append("<h3>City by city</h3>" + _by_city(prediction))
    facts = [
        f"<tr>{_first(one.city)}{markup.cell(one.regions, 'd')}{markup.cell(one.components, 'd')}"
        f"{markup.cell(100 * one.variance, '.1f', ' %')}{markup.cell(100 * one.variance_here, '.1f', ' %')}</tr>"
        for one in prediction.cities
    ]
    heads = ["Left out", "Regions", "Components", "Variance of the others held", "Of the left-out city's differences"]
    parts.append("<h3>The components</h3>" + markup.table(heads, facts, "Components by left-out city"))
    return "".join(parts)


def _by_city(prediction: ParameterPrediction) -> str:
    pooled = {one.city: one.mae for one in prediction.predicted if one.predictor == "pooled_unchanged"}
    rows = []
    for one in prediction.predicted:
        change = markup.cell(100 * (one.mae / pooled[one.city] - 1) if pooled[one.city] else None, "+.1f", " %")
        penalty = markup.cell(one.penalty, "g")
        cells = f"{_numbers(one.r2, one.r2_within, one.mae)}{change}{penalty}"
        rows.append(f"<tr>{_first(one.city)}{_words(part_label(one.predictor))}{cells}</tr>")
    heads = ["Left out", "Predictor", "R²", "R² within the city", "MAE", "Against the pooled model", "Penalty"]
    return markup.table(heads, rows, "Prediction by left-out city", box="tall")


def _numbers(r2: float, r2_within: float, mae: float) -> str:
    return f"{markup.cell(r2, '.3f')}{markup.cell(r2_within, '.3f')}{markup.cell(mae, '.4f')}"


def _first(text: str) -> str:
    return f'<th scope="row" data-value="{escape(text)}">{escape(text)}</th>'


def _words(text: str) -> str:
    return f'<td class="words" data-value="{escape(text)}">{escape(text)}</td>'


def prompt_content(inspection: Inspection, prediction: ParameterPrediction | None) -> Mapping[str, object]:
    """Returns what the page shows as JSON values; None stands where a number does not exist."""

    def finite(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    regions = []
    for row, name in enumerate(inspection.names):
        places = {part: projection.places[row].tolist() for part, projection in inspection.projections.items()}
        regions.append(
            {
                "region": name,
                "city": inspection.cities[row],
                "target": row >= inspection.num_sources,
                "function_class": inspection.labels[row],
                "places": places,
            }
        )
    neighbours = [
        {
            "region": inspection.names[row],
            "nearest": [{"region": inspection.names[near], "distance": distance} for near, distance in found],
        }
        for row, found in inspection.neighbours.items()
    ]
    recall = [
        {"city": one.city, "part": one.part, "days": one.days, "pairs": one.pairs}
        | {f"recall@{rank}": rate for rank, rate in one.found.items()}
        for one in inspection.recall
    ]
    content = {
        "function_classes": list(inspection.class_names),
        "variance": {part: list(projection.variance) for part, projection in inspection.projections.items()},
        "regions": regions,
        "neighbours": neighbours,
        "recall": recall,
    }
    if prediction is None:
        return content | {"prediction": None}
    cities = [dataclasses.asdict(one) | {"variance_here": finite(one.variance_here)} for one in prediction.cities]
    predicted = [
        dataclasses.asdict(one) | {key: finite(getattr(one, key)) for key in ("r2", "r2_within", "mae", "penalty")}
        for one in prediction.predicted
    ]
    return content | {"prediction": {"cities": cities, "predicted": predicted}}
