"""In: names, numbers and rows of a run.
Out: the words and the HTML pieces that the sections of the page share.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_ACRONYMS = {"gpdiff": "GPDiff", "mlp": "MLP", "maml": "MAML"}


def escape(value: Any) -> str:
    """Returns any value as text that HTML takes literally, in an element and in an attribute."""
    return html.escape(str(value), quote=True)


def method_label(name: str) -> str:
    """Returns a method's name as a reader would write it: gpdiff_few_shot is "GPDiff few-shot"."""
    for ending in ("_few_shot", "_zero_shot"):
        if name.endswith(ending):
            return f"{method_label(name.removesuffix(ending))} {ending[1:].replace('_', '-')}"
    words = [_ACRONYMS.get(word, word) for word in name.split("_")]
    return " ".join([words[0][:1].upper() + words[0][1:], *words[1:]])


def ranked_methods(methods: Mapping[str, Any]) -> list[str]:
    """Returns the methods that have an error, the smallest first."""
    known = [name for name in methods if is_number(methods[name].get("mae_mean"))]
    return sorted(known, key=lambda name: (methods[name]["mae_mean"], name))


def is_ours(name: str) -> bool:
    """Returns whether a method is GPDiff."""
    return name.startswith("gpdiff")


def best_baseline(ranked: Sequence[str]) -> str | None:
    """Returns the best method that is not GPDiff, or None."""
    return next((name for name in ranked if not is_ours(name)), None)


def role_of(name: str, ranked: Sequence[str]) -> str:
    """Returns the role, hence the colour, that a method has on this page: one of `canvas.ROLES`."""
    if is_ours(name):
        return "zero-shot" if name.endswith("zero_shot") else "few-shot"
    if name == best_baseline(ranked):
        return "baseline"
    return "history" if name == "historical_average" else "other"


def is_number(value: Any) -> bool:
    """Returns whether a value of a file is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(value: float | int) -> str:
    """Returns three significant digits, four from 100 on."""
    if value == 0:
        return "0"
    return f"{value:.{max(1 if abs(value) < 1e4 else 0, 2 - math.floor(math.log10(abs(value))))}f}".replace("-", "−")


def percent_apart(value: float | int, reference: float | int) -> str:
    """Returns how far an error is from another, to stand before the other's name: "8.1 % below"."""
    if reference == 0:
        return "against"
    percent = 100 * (value / reference - 1)
    if abs(percent) < 0.05:
        return "level with"
    return f"{abs(percent):.1f} % {'below' if percent < 0 else 'above'}"


def format_minutes(minutes: float | int) -> str:
    """Returns a time ahead in words: 90 is "90 minutes", 360 is "6 hours"."""
    amount, word = (minutes, "minute") if minutes % 60 or minutes == 0 else (minutes / 60, "hour")
    return f"{amount:g} {word}{'' if amount == 1 else 's'}"


def unit_of(metrics: Mapping[str, Any]) -> str:
    """Returns the unit of the errors in words."""
    return str(metrics.get("unit") or "units of the data")


def missing(reason: str | None) -> str:
    """Returns the remark that stands where a part of the page cannot be shown."""
    return f'<p class="missing">Not shown: {escape(reason or "the run did not write it")}.</p>'


def table(head: Iterable[str], rows: Iterable[str], caption: str, *, box: str = "") -> str:
    """Returns a sortable table in a box that scrolls by itself; `rows` are finished `<tr>` elements."""
    heads = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    return (
        f'<div class="scroll{" " + box if box else ""}" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<table class="sortable"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def cell(value: Any, form: str, extra: str = "") -> str:
    """Returns a table's cell of a number, written by a format such as ".2f"; a dash where there is none."""
    if not is_number(value):
        return '<td data-value="">–</td>'
    return f'<td data-value="{value:.9g}">{format(value, form).replace("-", "−")}{extra}</td>'


def figure(drawing: str, caption: str, kind: str = "") -> str:
    """Returns a drawing with its caption; the caption is plain text."""
    mark = f' class="{kind}"' if kind else ""
    return f'<figure{mark}><div class="canvas">{drawing}</div><figcaption>{escape(caption)}</figcaption></figure>'


def keys(entries: Iterable[tuple[str, str]]) -> str:
    """Returns a legend: pairs of a role (or "ink", or "band") and words."""
    parts = []
    for role, words in entries:
        band, variable = (" band", "few-shot") if role == "band" else ("", role)
        parts.append(f'<span><i class="key{band}" style="--mark: var(--{variable})"></i>{escape(words)}</span>')
    return f'<p class="keys">{"".join(parts)}</p>'
