"""In: a city and its next hours. Out: one HTML page: what is coming where, and the busiest regions with their bands."""

import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from gpdiff_jax.cities import City, resample
from gpdiff_jax.errors import InputError
from gpdiff_jax.report.document import write_page
from gpdiff_jax.report.figures import map_figure, next_figure
from gpdiff_jax.report.layout import graph_layout, project_coordinates
from gpdiff_jax.report.markup import cell, escape, figure, format_minutes, keys, missing, number, table
from gpdiff_jax.transfer.next_hours import NextHours

_BUSIEST = 9
_MOST_ROWS = 1000
_MOST_DRAWN = 1500  # regions of a graph without coordinates, whose layout is dense algebra


def write_next_page(path: pathlib.Path, city: City, made: NextHours, notes: Sequence[str] = ()) -> pathlib.Path:
    """Writes the page; see `report.render_next`."""
    city = _at_interval(city, made)
    when, ahead = _moment(made, 0), format_minutes(city.interval_minutes * made.forecast.shape[1])
    name = city.place or city.name
    busiest = np.argsort(-made.forecast.mean(axis=1), kind="stable")
    regions = "".join(_region(city, made, int(node), place) for place, node in enumerate(busiest[:_BUSIEST]))
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    parts = [
        f"<header><h1>{escape(name)}: the next {escape(ahead)}</h1>",
        f'<p class="lead">{city.num_nodes} regions, {escape(city.unit)}, forecast from {escape(when)}.</p></header>',
        *([f"<section><h2>To be looked at</h2><ul>{listed}</ul></section>"] if listed else []),
        f"<section><h2>What is coming</h2>{_map(city, made)}</section>",
        f'<section><h2>The busiest regions</h2>{_legend(made)}<div class="figures">{regions}</div></section>',
        f"<section><h2>All regions</h2>{_table(city, made, busiest[:_MOST_ROWS])}</section>",
    ]
    try:
        return write_page(path, f"{name}: the next {ahead}", parts)
    except FileNotFoundError:
        raise InputError(f"{path} cannot be written, its folder does not exist; make it or name another") from None


def _at_interval(city: City, made: NextHours) -> City:
    """The city at the interval of its forecasts, if they are of it and of what comes after it."""
    if city.num_channels != 1 or made.node_ids != city.node_ids:
        raise InputError(
            f"the forecasts are of {len(made.node_ids)} regions of one channel, and city {city.name!r} has "
            f"{city.num_nodes} of {city.num_channels}, or in another order; give the city that was forecast"
        )
    if made.times is None or city.start is None:
        return city
    interval = int((made.times[1:2] - made.times[:1]).astype(int).sum()) or city.interval_minutes
    city = resample(city, interval, keep_silent=True)
    assert city.start is not None
    end = city.start + city.num_steps * np.timedelta64(interval, "m")
    if made.times[0] < end:
        raise InputError(
            f"the forecasts begin at {made.times[0]}, and city {city.name!r} was read until {end}; give it as it was "
            "known when it was forecast"
        )
    return city


def _moment(made: NextHours, step: int) -> str:
    if made.times is None:
        return f"step {step + 1} after the last reading"
    return str(made.times[step]).replace("T", " ")


def _map(city: City, made: NextHours) -> str:
    if city.latitude is not None and city.longitude is not None:
        positions = project_coordinates(np.stack([city.longitude, city.latitude], axis=1))
        place = "Regions lie where they are, lines are the edges of the graph."
    elif city.num_nodes <= _MOST_DRAWN:
        positions = graph_layout(np.stack([city.senders, city.receivers], axis=1).astype(int), city.num_nodes)
        place = "Regions are placed by the graph, near where few edges lie between them; north is not up."
    else:
        return missing(f"the city has no coordinates, and its {city.num_nodes} regions are too many to lay out")
    mean = made.forecast.mean(axis=1)
    busiest = int(np.argmax(mean))
    drawing = map_figure(
        positions,
        np.stack([city.senders, city.receivers], axis=1).astype(int),
        mean,
        diverging=False,
        name="map",
        bar_label=f"forecast, {city.unit}",
        alt=f"Map of the mean forecast of {city.num_nodes} regions; the largest is {city.node_ids[busiest]}.",
    )
    words = (
        f"Mean over the steps ahead. The largest is {city.node_ids[busiest]}, {number(float(mean[busiest]))}. {place}"
    )
    return figure(drawing, words, "middling")


def _legend(made: NextHours) -> str:
    entries = [("ink", "read"), ("few-shot", "forecast")]
    return keys(entries if made.quantiles is None else [*entries, ("band", "50 and 90 % of what will be read")])


def _region(city: City, made: NextHours, node: int, place: int) -> str:
    per_day = city.steps_per_day
    read = city.values[-per_day:, node, 0]
    forecast = made.forecast[node]
    late = 0
    if made.times is not None and city.start is not None:
        step = np.timedelta64(city.interval_minutes, "m")
        late = int((made.times[0] - city.start) // step) - city.num_steps
    hours = city.interval_minutes / 60 * np.concatenate([np.arange(-len(read), 0) - late, np.arange(len(forecast))])
    drawing = next_figure(
        hours,
        read,
        forecast,
        None if made.quantiles is None else made.quantiles[node],
        labels=_clock(made, hours),
        name=f"region-{place}",
        y_label=city.unit,
        alt=f"Region {city.node_ids[node]}: the last day read, and {len(forecast)} steps ahead.",
    )
    first, last = number(float(forecast[0])), number(float(forecast[-1]))
    words = f"{city.node_ids[node]}: {first} in the first step, {last} in the last"
    if made.quantiles is not None:
        low, high = (number(float(value)) for value in made.quantiles[node, -1, [0, -1]])
        words += f" ({low} to {high} in nine of ten)"
    return figure(drawing, f"{words}.")


def _clock(made: NextHours, hours: Float[np.ndarray, " M"]) -> Sequence[tuple[float, str]]:
    """Hours since now, and what the clock says then, every six hours."""
    if made.times is None:
        return [(float(hour), f"{hour:+g} h") for hour in np.arange(-24, hours[-1] + 1, 6)]
    minute = int(made.times[0].astype("datetime64[m]").astype(np.int64)) % 1440
    first = -(-(60 * hours[0] + minute) // 360) * 360
    marks = np.arange(first, 60 * hours[-1] + minute + 1, 360)
    return [(float((mark - minute) / 60), f"{int(mark) % 1440 // 60:02d}:00") for mark in marks]


def _table(city: City, made: NextHours, nodes: np.ndarray) -> str:
    heads = ["region", *(_moment(made, step) for step in range(made.forecast.shape[1]))]
    rows = []
    for node in nodes:
        cells = []
        for step, value in enumerate(made.forecast[node]):
            band = "" if made.quantiles is None else _band(made.quantiles[node, step])
            cells.append(cell(float(value), ".4g", band))
        name = escape(city.node_ids[node])
        rows.append(f'<tr><th scope="row" data-value="{name}">{name}</th>{"".join(cells)}</tr>')
    more = city.num_nodes - len(nodes)
    left = f"<p>The {len(nodes)} busiest; {more} more are in the table of the command.</p>" if more else ""
    return table(heads, rows, "Forecasts of all regions, with the interval of nine in ten") + left


def _band(quantiles: Float[np.ndarray, " Q"]) -> str:
    low, high = (number(float(value)) for value in quantiles[[0, -1]])
    return f' <small class="band">{low} to {high}</small>'
