"""How far to fine-tune, in cities that neither a generator nor the README's tables know.

    python -m benchmarks.fine_tuning --data_dir DIR [--covariates calendar] [--seed 0] [--minutes 60]
    python -m benchmarks.fine_tuning --table [--covariates calendar]

A generator of four cities is trained, preset small. Every city of --cities is forecast for the seven days after
stretches of three support days that are spread over it: by the pooled model and by generated parameters, as they are,
after the shared update, and after that and steps in codes, each of --codes; and by draws of the posterior at each of
--posterior_rates, alone, after the shared update, and after that and the last of --codes. What `AdaptConfig` and
`PosteriorConfig` take by themselves was chosen so. What is finished is kept in --results, where a way that is asked for
later is added if the generator is the same (of another one all are measured anew), and --table prints the results with
so many --stretches as Markdown.
"""

import dataclasses
import json
import os
import pathlib
import time

import jax
from absl import flags

import gpdiff_jax as gpd
from benchmarks.cities import hourly_city
from benchmarks.fine_tuning_cases import Ways, errors_of_ways, table, ways_of
from benchmarks.held_out_stretches import stretches
from benchmarks.measuring import deadline, device_name, print_line
from experiments import command_line
from gpdiff_jax.data.series import COVARIATES
from gpdiff_jax.errors import InputError
from gpdiff_jax.files import write_json
from gpdiff_jax.run.settings import Settings

flags.DEFINE_string("data_dir", os.environ.get("GPDIFF_DATA"), "folder of city files; default GPDIFF_DATA")
flags.DEFINE_enum("covariates", "calendar", COVARIATES, "what models see beside the readings")
flags.DEFINE_integer("seed", 0, "random seed of the generator", 0, 2**31 - 1)
flags.DEFINE_list(
    "cities",
    ["paris_bike_counters", "salvador_bus", "taipei_metro", "auckland_pedestrians", "sf_bike_2014"],
    "the cities that are forecast",
)
flags.DEFINE_integer("stretches", 1, "stretches of support days in a city", 1)
flags.DEFINE_list("codes", ["12x1", "48x4x0.9"], "steps in codes, as STEPSxRATE or STEPSxRATExMOMENTUM")
flags.DEFINE_list("posterior_rates", ["480", "1920"], "rates of the posterior")
flags.DEFINE_string("out_dir", "runs/fine_tuning", "folder of the generators")
flags.DEFINE_string("results", "benchmarks/results/fine_tuning", "folder of the results, one file per stretch")
flags.DEFINE_float("minutes", None, "begin no further stretch after so many; no limit if not given", 0)
flags.DEFINE_bool("table", False, "print the results as a table, instead of measuring")

_SOURCES = ("beijing_metro", "nyc_bike_2014", "nyc_taxi_zones_2018", "melbourne_pedestrians")
_FORMAT = 2


def trained_generator(settings: Settings, seed: int) -> gpd.Hypernetwork:
    """The generator of the four cities, trained once."""
    folder = pathlib.Path(flags.FLAGS.out_dir) / f"{settings.data.covariates}_{seed}"
    zoo_key, generator_key = jax.random.split(jax.random.key(seed))
    zoo = gpd.harvest_cities(
        [hourly_city(name) for name in _SOURCES],
        key=zoo_key,
        folder=folder / "zoo",
        data=settings.data,
        pooled=settings.pooled,
        config=settings.harvest,
    )
    return gpd.pretrain(zoo, key=generator_key, config=settings.pretrain, folder=folder / "hypernetwork")


def measure(ways: Ways, results: pathlib.Path) -> None:
    """Measures in every city and stretch what the folder of results lacks of the ways."""
    given, end = flags.FLAGS, deadline(flags.FLAGS.minutes)
    settings = Settings.from_preset("small")
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, covariates=given.covariates))
    cities = {name: hourly_city(name) for name in given.cities}
    targets = {name: list(stretches(city, settings.data, given.stretches)) for name, city in cities.items()}
    generator = trained_generator(settings, given.seed)
    for number in range(given.stretches):
        for name, city in cities.items():
            path = results / f"{given.covariates}_{given.seed}_{name}_{number}_of_{given.stretches}.json"
            known = json.loads(path.read_text()) if path.exists() else {}
            same = (known.get("format"), known.get("generator")) == (_FORMAT, generator.identity)
            known = known["error"] if same else {}
            missing = ways.without(known)
            if not (missing.codes or missing.rates) or number >= len(targets[name]) or time.monotonic() > end:
                continue
            found = errors_of_ways(
                generator,
                city,
                targets[name][number],
                missing,
                key=jax.random.key(given.seed),
                generate=settings.generate,
                adapt=settings.adapt,
            )
            results.mkdir(parents=True, exist_ok=True)
            facts = {"format": _FORMAT, "covariates": given.covariates, "seed": given.seed, "city": name}
            more = {"stretch": number, "unit": city.unit, "sources": list(_SOURCES), "generator": generator.identity}
            write_json(path, {**facts, **more, "device": device_name(), "error": known | found})
            for way, error in found.items():
                if error is not None:
                    print_line("fine_tuning", f"{name} {number}: {way}", "mean_absolute_error", error, city.unit)


def main(argv: list[str]) -> None:
    """Measures what the folder of results lacks, or prints what it holds."""
    del argv
    given, results = flags.FLAGS, pathlib.Path(flags.FLAGS.results)
    ways = ways_of(given.codes, given.posterior_rates)
    if given.table:
        names = f"{given.covariates}_[0-9]*_of_{given.stretches}.json"
        read = [json.loads(path.read_text()) for path in sorted(results.glob(names))]
        read = [one for one in read if one["format"] == _FORMAT]
        if not read:
            raise InputError(f"{str(results)!r} holds no results with --covariates {given.covariates}; measure some")
        print(table(read), end="")
        return
    if given.data_dir is None:
        raise InputError("neither --data_dir nor GPDIFF_DATA names the folder of the city files")
    if known := sorted(set(given.cities) & set(_SOURCES)):
        raise InputError(f"--cities (={','.join(known)}) are sources of the generator; name others")
    gpd.enable_compilation_cache()
    measure(ways, results)


if __name__ == "__main__":
    command_line.run(main)
