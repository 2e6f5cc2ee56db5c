"""Forecasts what comes after the last reading of a city, for every region, by a trained generator.

    python -m experiments.forecast --city my_city.npz --out_file next.csv

The last days of the city are its support, as many as the generator was trained for, or as there are; one is enough.
The table has a row for every region and step: unique_id, ds (local begin of the step), mean and the quantiles q05, q25,
q50, q75 and q95, in the city's unit. Without --hypernetwork, the generator is the package's own, of hourly counts of
people.
"""

import pathlib

from absl import flags

from experiments import command_line

_HYPERNETWORK = flags.DEFINE_string("hypernetwork", None, "Folder of a trained generator; default the package's own.")
_CITY = flags.DEFINE_string("city", None, "City file, NAME.npz; see experiments.prepare_city.", required=True)
_OUT_FILE = flags.DEFINE_string("out_file", "next.csv", "Table to write, .csv or .parquet.")
_PAGE = flags.DEFINE_string("page", None, "Page to write too, NAME.html: a map, the busiest regions, all forecasts.")
_AT = flags.DEFINE_string("at", None, "Local time of now, e.g. 2024-05-03T17:00; nothing later is read.")
_ADAPT = flags.DEFINE_bool("adapt", False, "Fine-tune the generated parameters on the support days (few-shot).")
_SAMPLES = flags.DEFINE_integer(
    "samples",
    None,
    "Parameter sets per region; default 5, of very large cities fewer.",
    lower_bound=1,
    upper_bound=1000,
)
_CHANNEL = flags.DEFINE_string("channel", "first", "Channel of the city to forecast.")
_MODEL = flags.DEFINE_string("model", None, "File of the generator's model, where it is not built in.")
_SEED = flags.DEFINE_integer("seed", 0, "Random seed.", lower_bound=0, upper_bound=2**31 - 1)
_ANY_KIND = flags.DEFINE_bool("any_kind", False, "Take a city of another kind than the generator's.")
_MISSING_ABOVE = flags.DEFINE_float("missing_above", None, "Readings above this value are missing, e.g. fill values.")


def main(argv: list[str]) -> None:
    """Forecasts, and writes the table."""
    del argv
    # Not before: `--help` need not wait for the library.
    import jax

    import gpdiff_jax as gpd
    from gpdiff_jax.cities.calendar import local_moment
    from gpdiff_jax.run.new_city import (
        forecast_table,
        load_generator,
        notes_above,
        notes_of,
        print_notes,
        samples_that_fit,
    )
    from gpdiff_jax.run.next_table import check_table_name, write_next

    out = pathlib.Path(_OUT_FILE.value)
    check_table_name(out)
    page = None if _PAGE.value is None else pathlib.Path(_PAGE.value)
    if page is not None and page.suffix != ".html":
        raise gpd.InputError(f"--page (={page}) is no page; name it {page.stem}.html")
    for path in (out, page):
        # Before anything is worked out, or written.
        if path is not None and not path.absolute().parent.is_dir():
            raise gpd.InputError(f"{path} cannot be written, its folder does not exist; make it or name another")
        if path is not None and path.is_dir():
            raise gpd.InputError(f"{path} is a folder; name a file")
    at = None if _AT.value is None else local_moment(_AT.value, "at")
    gpd.use_every_core()
    gpd.enable_compilation_cache()
    hypernetwork, _ = load_generator(_HYPERNETWORK.value, _MODEL.value)
    city = gpd.load_city(_CITY.value, missing_above=_MISSING_ABOVE.value)
    new_city = gpd.prepare_new_city(city, hypernetwork, channels=_CHANNEL.value, at=at, any_kind=_ANY_KIND.value)
    notes = [*notes_above(_CITY.value, _MISSING_ABOVE.value), *notes_of(city, new_city)]
    print_notes(notes)
    config = gpd.GenerateConfig(samples=_SAMPLES.value or samples_that_fit(hypernetwork, new_city.city.num_nodes))
    key = jax.random.key(_SEED.value)
    parameters = hypernetwork.generate(new_city.prompts, key=key, config=config, any_kind=True)
    adapt = gpd.AdaptConfig() if _ADAPT.value else None
    channel = gpd.select_channels(city, _CHANNEL.value)[0]
    made = gpd.forecast_next(parameters, channel, at=at, adapt=adapt, key=jax.random.fold_in(key, 1))
    write_next(out, made)
    if page is not None:
        gpd.render_next(page, new_city.read, made, notes=notes)
    print(forecast_table(new_city, made.as_window(), whole=out.name))
    print(*(path for path in (out, page) if path is not None), sep="\n")


if __name__ == "__main__":
    command_line.run(main)
