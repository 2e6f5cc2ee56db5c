"""What a generator's forecasts err by after one to fourteen days of a city that it never saw, and what its bands hold.

    python -m benchmarks.support_days --city hangzhou_metro --hypernetwork runs/crowd_hourly/hangzhou_metro/hypernetwork
    python -m benchmarks.support_days --figure docs/support_days.svg

The city is forecast in its test span (the last 30 %) after three support days, as in the README's tables, and for seven
days after several stretches of support days, of each number of --days, all before the same seven days. Errors, shares
inside the intervals of 50 and 90 %, and twice the mean pinball loss of the quantiles, for weekdays, weekends and all,
zero-shot, fine-tuned, and of the historical average with the quantiles of its own residuals. One JSON file per city in
--results; --figure draws those that are there.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

import gpdiff_jax as gpd
from benchmarks.measuring import device_name
from benchmarks.moments import average_quantiles, interval_scores, means_of
from experiments import command_line
from gpdiff_jax.baselines.rules import historical_average
from gpdiff_jax.cities import City
from gpdiff_jax.cities.splits import Span, TargetSplit, split_before, split_target
from gpdiff_jax.data.target import split_city
from gpdiff_jax.data.windows import window_starts
from gpdiff_jax.errors import InputError
from gpdiff_jax.files import write_json
from gpdiff_jax.prompts.prompt import region_prompts
from gpdiff_jax.region_parameters import RegionParameters
from gpdiff_jax.transfer.evaluate import observed_truth
from gpdiff_jax.transfer.next_hours import forecast_target

flags.DEFINE_string("data_dir", os.environ.get("GPDIFF_DATA"), "folder of city files; default GPDIFF_DATA")
flags.DEFINE_string("city", None, "the city, which the generator never saw")
flags.DEFINE_string("hypernetwork", None, "folder of the generator")
flags.DEFINE_list("days", ["1", "2", "3", "5", "7", "14"], "numbers of support days")
flags.DEFINE_integer("stretches", 4, "stretches of each number of support days; 0 measures the test span alone", 0)
flags.DEFINE_integer("samples", 3, "parameter sets per region", 1)
flags.DEFINE_string("results", "benchmarks/results/support_days", "folder of the results, one file per city")
flags.DEFINE_string("figure", None, "figure to draw of the results, NAME.svg")

_TEST_DAYS = 7
_AHEAD = "the seven days"


def stretches(city: City, days: int, count: int) -> Iterator[Span]:
    """The seven days after each of several stretches of so many days, spread over a city's series."""
    per_day = city.steps_per_day
    first, last = days * per_day, city.num_steps - _TEST_DAYS * per_day
    if last < first:
        raise InputError(f"city {city.name!r} is shorter than {days} + {_TEST_DAYS} days; name fewer --days")
    for start in sorted(set(np.linspace(first, last, count).astype(int))):
        yield Span(int(start), int(start) + _TEST_DAYS * per_day)


def judge_split(city: City, generator: gpd.Hypernetwork, split: TargetSplit, samples: int) -> dict[str, dict]:
    """Sums of `interval_scores` of a span after some support days.

    Args:
      city: one channel, at the interval of the generator, which never saw it.
      generator: trained on others.
      split: the support days, and the span that is forecast.
      samples: K.

    Returns:
      By part ("all", "weekdays", "weekends") and method: the sums, and the number of readings last.
    """
    days = len(split.support) // city.steps_per_day
    data = dataclasses.replace(generator.data, support_days=days)
    sizes: Any = {"history": data.history, "horizon": data.horizon}
    starts = window_starts(city, split.test, reach_back=True, **sizes)
    target = split_city(city, data, split, starts)
    prompts = region_prompts(city, [split.support], generator.prompt_encoder)
    config = gpd.GenerateConfig(samples=samples)
    made: RegionParameters = generator.generate(prompts, key=jax.random.key(0), config=config)
    average = historical_average(city, split.support, starts, **sizes)
    forecasts = {
        "historical_average": (average, average_quantiles(city, split.support, average, starts + data.history))
    }
    for name, adapt in (("zero_shot", None), ("adapted", gpd.AdaptConfig())):
        found = forecast_target(made, target, adapt, jax.random.key(1))
        assert found.quantiles is not None
        forecasts[name] = found.forecast, found.quantiles
    truth, weekend = observed_truth(city, target)
    read = np.isfinite(truth)
    on_weekend = np.zeros(truth.shape, bool) if weekend is None else np.broadcast_to(weekend[:, None], truth.shape)
    sums: dict[str, dict[str, np.ndarray]] = {}
    for part, of in (("all", read), ("weekdays", read & ~on_weekend), ("weekends", read & on_weekend)):
        for name, (forecast, quantiles) in forecasts.items():
            scores = interval_scores(forecast[of], quantiles[of], truth[of]).sum(axis=0)
            sums.setdefault(part, {})[name] = np.append(scores, of.sum())
    return sums


def _means(found: Sequence[dict[str, dict]]) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for part in found[0]:
        totals = {name: np.sum([one[part][name] for one in found], axis=0) for name in found[0][part]}
        count = int(totals["zero_shot"][-1])
        if count:
            parts[part] = {"readings": count} | {name: means_of(total) for name, total in totals.items()}
    return parts


def measure(city: City, generator: gpd.Hypernetwork, days: Sequence[int], count: int, samples: int) -> dict[str, Any]:
    """Errors, coverage and losses in the test span after three days, and after every number of support days."""
    split = split_target(
        city.num_steps,
        city.steps_per_day,
        3,
        history=generator.data.history,
        horizon=generator.data.horizon,
        name=city.name,
    )
    result: dict[str, Any] = {"test_span": _means([judge_split(city, generator, split, samples)])}
    for number in days if count else ():
        found = []
        for test in stretches(city, max(days), count):
            known: Any = {"history": generator.data.history, "before": _AHEAD, "name": city.name}
            split = split_before(test, city.steps_per_day, number, **known)
            found.append(judge_split(city, generator, split, samples))
        result.setdefault("support_days", {})[str(number)] = _means(found)
    return result


def draw(results: pathlib.Path, path: pathlib.Path) -> None:
    """Draws error against support days, of all cities for which several numbers were measured."""
    from matplotlib.figure import Figure

    found = {one.stem: json.loads(one.read_text()) for one in sorted(results.glob("*.json"))}
    found = {name: one for name, one in found.items() if one.get("support_days")}
    if not found:
        raise InputError(f"{results} holds no city of several numbers of support days; measure one first")
    figure = Figure(figsize=(4.6 * len(found), 3.6), layout="constrained")
    labels = {"historical_average": "mean of the support days", "zero_shot": "zero-shot", "adapted": "few-shot"}
    for axes, (name, one) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        days = [int(number) for number in one["support_days"]]
        for method, label in labels.items():
            errors = [part["all"][method]["mean_absolute_error"] for part in one["support_days"].values()]
            axes.plot(range(len(days)), errors, marker="o", label=label)
        axes.set_xticks(range(len(days)), [str(number) for number in days])
        axes.set(title=name, xlabel="support days", ylabel=one["unit"], ylim=(0, None))
    figure.axes[0].legend()
    figure.savefig(path, metadata={"Date": None})


def main(argv: list[str]) -> None:
    """Measures a city, or draws what was measured."""
    del argv
    given, results = flags.FLAGS, pathlib.Path(flags.FLAGS.results)
    if given.figure is not None:
        draw(results, pathlib.Path(given.figure))
        return
    for name in ("city", "hypernetwork", "data_dir"):
        if given[name].value is None:
            raise InputError(f"--{name} is not given; name it, or --figure to draw what was measured")
    try:
        days = [int(word) for word in given.days]
    except ValueError as error:
        raise InputError(f"--days (={','.join(given.days)}) must be whole numbers, as 1,3,14") from error
    gpd.enable_compilation_cache()
    city = gpd.load_city(pathlib.Path(given.data_dir) / f"{given.city}.npz")
    city = gpd.select_channels(gpd.resample(city, 60), "first")[0]
    generator = gpd.Hypernetwork.load(given.hypernetwork)
    found = measure(city, generator, days, given.stretches, given.samples)
    folder = "/".join(pathlib.Path(given.hypernetwork).absolute().parts[-2:])
    command = (
        f"python -m benchmarks.support_days --city {given.city} --hypernetwork runs/crowd_hourly/{folder} "
        f"--days {','.join(map(str, days))} --stretches {given.stretches} --samples {given.samples}"
    )
    facts = {"city": given.city, "unit": city.unit, "command": command, "device": device_name()}
    results.mkdir(parents=True, exist_ok=True)
    write_json(results / f"{given.city}.json", facts | found)
    print(results / f"{given.city}.json")


if __name__ == "__main__":
    command_line.run(main)
