"""In: the diagnostics.json of a run's folder.
Out: diagnostics.html in it, one self-contained page that says in plain words whether the generator generates.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from gpdiff_jax.errors import InputError
from gpdiff_jax.files import read_json, user_path
from gpdiff_jax.report import markup
from gpdiff_jax.report.document import write_page
from gpdiff_jax.report.markup import escape

_GROUPS = {"training": "Regions trained on", "held_out": "Held-out source regions"}
_ENOUGH_RISE = 5.0  # per cent, below which a generator is said to ignore its prompt

# Key, heading, format and what it means, of latents and of forecasts.
_LATENT_ROWS = (
    ("rms", "Size", ".3f", "Root mean square distance from the zoo's average, in units of the zoo's spread."),
    ("harvested_rms", "Size, harvested", ".3f", "The same of the regions' own harvested vectors."),
    (
        "rms_ratio",
        "Size, generated to harvested",
        ".2f",
        "About 1: as varied as the zoo. Near 0: collapsed to its average. A target is compared with training regions.",
    ),
    (
        "sample_rms",
        "Size of what separates samples",
        ".3f",
        "How far samples of one region lie from their mean; the rest of the size is what separates regions.",
    ),
    ("effective_rank", "Effective rank", ".1f", "Directions that generated vectors spread over, one per region."),
    ("harvested_effective_rank", "Effective rank, harvested", ".1f", "The same of the regions' own harvested vectors."),
    (
        "nearest",
        "Distance to the nearest training vector",
        ".2f",
        "Median over generated vectors. 0 would be copies of the training set.",
    ),
    (
        "harvested_nearest",
        "The same, harvested",
        ".2f",
        "Median over the regions' own vectors, to the nearest one of another training region.",
    ),
    (
        "nearest_ratio",
        "Distance, generated to harvested",
        ".2f",
        "Near 0: memorised. About 1: as far from the training set as real vectors. Far above 1: outside the zoo.",
    ),
    (
        "correlation",
        "Prompt against parameters",
        ".2f",
        "Correlation, over pairs of regions, of the distance of their prompts and of what was generated for them. 0: "
        "what the prompt changes does not show in the parameters.",
    ),
    ("harvested_correlation", "The same, harvested", ".2f", "How much the prompt tells of the regions' own vectors."),
)
_ERROR_ROWS = (
    ("error", "Error, own prompt", "{:.4g}", "Mean absolute error, zero-shot, the samples' forecasts averaged."),
    ("shuffled", "Error, shuffled prompts", "{:.4g}", "The same with the prompt of another region of the same city."),
    (
        "rise",
        "Rise by shuffling",
        "{:+.1f} %",
        "What a region's own prompt is worth. 0: the generator ignores which region of a city the prompt describes.",
    ),
    ("rise_deviation", "Deviation of the rise", "{:.1f} %", "Over the shuffles; a rise below it may be chance."),
    ("shuffled_across", "Error, shuffled over all cities", "{:.4g}", "With the prompt of any other source region."),
    (
        "rise_across",
        "Rise by shuffling over all cities",
        "{:+.1f} %",
        "What own prompts are worth, the city's part too.",
    ),
    ("rise_deviation_across", "Deviation of that rise", "{:.1f} %", "Over the shuffles."),
    ("pooled", "Error of the pooled model", "{:.4g}", "One parameter vector for all; a generator should be below it."),
    (
        "harvested",
        "Error of the harvested vectors",
        "{:.4g}",
        "The regions' own parameters, chosen on these very windows: a bound that flatters.",
    ),
    ("spread", "Spread of the samples", "{:.4g}", "Standard deviation of the forecasts over the samples of a region."),
    (
        "disagreement",
        "Spread relative to the error",
        "{:.2f}",
        "Near 0: all samples forecast alike, and drawing several is of no use.",
    ),
)


def render_diagnostics(run_dir: str | os.PathLike[str]) -> pathlib.Path:
    """Writes diagnostics.html into a run folder, from its diagnostics.json alone.

    Args:
      run_dir: the folder.

    Returns:
      The page's path. It appears whole or not at all, and is the same for the same file.

    Raises:
      InputError: diagnostics.json is absent or broken.
    """
    run_dir = user_path(run_dir)
    path = run_dir / "diagnostics.json"
    try:
        content = read_json(path)
        name = content["target"]
        parts = [_header(content), _latents(content["groups"]), _responses(content["response"], content)]
    except FileNotFoundError as error:
        raise InputError(f"{str(run_dir)!r} has no diagnostics.json; run `experiments.diagnose` first") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{str(path)!r} is damaged ({type(error).__name__}); `experiments.diagnose` makes it again"
        ) from error
    return write_page(run_dir / "diagnostics.html", f"{name} – does it generate?", parts)


def _header(content: Mapping[str, Any]) -> str:
    badges = [f"seed {content['seed']}", f"{content['samples']} samples in {content['steps']} steps"]
    badges += [
        f"guidance {content['guidance']:g}",
        f"{content['shuffles']} shuffles",
        f"covariates {content['covariates']}",
        *([f"{content['protocol']} protocol"] if "protocol" in content else []),
    ]
    items = "".join(f"<li>{escape(text)}</li>" for text in badges)
    tiles = []
    for label, value, good, words in _verdicts(content):
        edge = "history" if good else "few-shot"
        tiles.append(
            f'<div class="tile" style="--edge: var(--{edge})"><div class="name">{escape(label)}</div>'
            f'<div class="figure">{escape(value)}</div><div class="note">{escape(words)}</div></div>'
        )
    return (
        '<header><p class="eyebrow">Does it generate?</p>'
        f"<h1>{escape(content['target'])}</h1>"
        '<p class="lead">A parameter generator may collapse to an average, copy what it was trained on, or ignore its '
        "prompt, and its forecasts may still be fair. These numbers tell.</p>"
        f'<ul class="badges">{items}</ul><div class="tiles">{"".join(tiles)}</div></header>'
    )


def _verdicts(content: Mapping[str, Any]) -> list[tuple[str, str, bool, str]]:
    """Label, value, whether it is well, and words, of what a reader should see first."""
    group, response = content["groups"]["held_out"], content["response"]["held_out"]
    found = []
    size = _ratio(group, "rms")
    if size is not None:
        well = 0.5 <= size <= 1.5
        words = (
            "as varied as the zoo" if well else "collapses towards an average" if size < 0.5 else "wilder than the zoo"
        )
        found.append(("Size, generated to harvested", f"{size:.2f}", well, words))
    rank = _ratio(group, "effective_rank")
    if rank is not None:
        words = "spreads over as many directions" if rank >= 0.5 else "keeps to few directions"
        found.append(("Effective rank, generated to harvested", f"{rank:.2f}", rank >= 0.5, words))
    distance = _ratio(group, "nearest")
    if distance is not None:
        well = 0.5 <= distance <= 1.5
        words = (
            "neither copies nor strays" if well else "close to copies" if distance < 0.5 else "strays outside the zoo"
        )
        found.append(("Distance to the nearest training vector, to harvested", f"{distance:.2f}", well, words))
    rise = response["rise"]
    if markup.is_number(rise):
        well = rise >= _ENOUGH_RISE
        words = "it follows its prompt" if well else "it all but ignores which region the prompt describes"
        found.append(("Error with shuffled prompts", f"{rise:+.1f} %".replace("-", "−"), well, words))
    spread = _disagreement(response)
    if spread is not None:
        words = "samples differ" if spread >= 0.05 else "samples forecast alike"
        found.append(("Disagreement of samples, to the error", f"{spread:.2f}", spread >= 0.05, words))
    return found


def _latents(groups: Mapping[str, Mapping[str, Any]]) -> str:
    columns = {name: dict(group) for name, group in groups.items()}
    for group in columns.values():
        like = (
            group
            if "harvested_rms" in group
            else {
                **group,
                "harvested_rms": groups["training"]["harvested_rms"],
                "harvested_nearest": groups["held_out"]["harvested_nearest"],
            }
        )
        group["rms_ratio"], group["nearest_ratio"] = _ratio(like, "rms"), _ratio(like, "nearest")
    rows = []
    for key, label, form, words in _LATENT_ROWS:
        cells = "".join(markup.cell(group.get(key), form) for group in columns.values())
        rows.append(_row(label, cells, words))
    head = ["What", *(f"{_group_label(name)} ({group['regions']})" for name, group in columns.items()), "What it means"]
    table = markup.table(head, rows, "Generated and harvested parameters")
    return (
        "<section><h2>Parameters</h2><p>Parameters as the generator sees them: per layer, in the directions in which "
        "the zoo differs, in units of its spread along them. Regions held out were not trained on, but the generator "
        f"was chosen by its forecasts for them.</p>{table}</section>"
    )


def _responses(response: Mapping[str, Mapping[str, Any]], content: Mapping[str, Any]) -> str:
    columns = {name: {**part, "disagreement": _disagreement(part)} for name, part in response.items()}
    rows = []
    for key, label, form, words in _ERROR_ROWS:
        cells = "".join(_text_cell(part.get(key), form) for part in columns.values())
        rows.append(_row(label, cells, words))
    head = ["What", *map(_group_label, columns), "What it means"]
    table = markup.table(head, rows, "Errors with own and with shuffled prompts")
    return (
        "<section><h2>Prompts shuffled</h2><p>The same noise, the prompt of another region. Held-out source regions "
        "are forecast on their validation windows, in standard deviations of the region; a target on its support "
        f"days, in {escape(markup.unit_of(content))}. The support days also made the target's prompts, so that column "
        f"flatters; its test span was not read.</p>{table}</section>"
    )


def _row(label: str, cells: str, words: str) -> str:
    first = f'<th scope="row" data-value="{escape(label)}">{escape(label)}</th>'
    return f'<tr>{first}{cells}<td class="words" style="white-space: normal" data-value="">{escape(words)}</td></tr>'


def _text_cell(value: Any, form: str) -> str:
    if not markup.is_number(value):
        return markup.cell(None, "")
    return f'<td data-value="{value:.9g}">{escape(form.format(value).replace("-", "−"))}</td>'


def _group_label(name: str) -> str:
    return _GROUPS.get(name, f"Target {name}")


def _ratio(group: Mapping[str, Any], key: str) -> float | None:
    """Generated to harvested, where both exist."""
    return _quotient(group.get(key), group.get(f"harvested_{key}"))


def _disagreement(part: Mapping[str, Any]) -> float | None:
    return _quotient(part.get("spread"), part.get("error"))


def _quotient(one: Any, other: Any) -> float | None:
    return one / other if markup.is_number(one) and markup.is_number(other) and other > 0 else None
