"""In: a table of readings, long or wide, and what links the regions: edges, sites or a matrix.
Out: a city file, which every other experiment reads, and on standard output what was seen in the tables.

    python -m experiments.prepare_city --readings counts.csv --sites sites.csv --kind crowd --out_file my_city.npz

A long table has the columns unique_id, ds and y; a wide one a column of times and one for every region. Files of public
data sets are read too: HDF5 frames and adjacency pickles of DCRNN, .npy and .npz arrays, CSV files of numbers without
times (--start), SciPy's sparse matrices, and LibCity's .dyna, .rel and .geo files.
"""

from absl import flags

from experiments import command_line

_READINGS = flags.DEFINE_string("readings", None, "Readings: a CSV or Parquet table, or an array file.", required=True)
_OUT_FILE = flags.DEFINE_string("out_file", None, "City file to write, NAME.npz.", required=True)
_KIND = flags.DEFINE_enum(
    "kind",
    None,
    ["crowd", "flow", "speed", "stock"],
    "What the city measures; a stock is what is there, as parked cars.",
    required=True,
)
_EDGES = flags.DEFINE_string("edges", None, "Table with from, to and weight or, with --distances, distance.")
_SITES = flags.DEFINE_string("sites", None, "Table with unique_id, latitude, longitude; links the nearest regions.")
_MATRIX = flags.DEFINE_string("matrix", None, "Matrix of weights between all regions: .npy, .npz, .pkl or .csv.")
_DISTANCES = flags.DEFINE_bool("distances", None, "Edges or matrix hold distances, which become a Gaussian kernel.")
_NEIGHBOURS = flags.DEFINE_integer(
    "neighbours", None, "Nearest sites that a region is linked with; default 5.", lower_bound=1
)
_START = flags.DEFINE_string(
    "start", None, "Local time of the first step of a file without times, e.g. 2018-01-01T00:00, or unknown."
)
_CHANNEL = flags.DEFINE_integer("channel", None, "Which quantity of an array [T, N, C]; default 0.", lower_bound=0)
_QUANTITY = flags.DEFINE_string(
    "quantity", None, "What is read; default visitors, vehicles, speed_kmh or available, by --kind."
)
_INTERVAL = flags.DEFINE_integer(
    "interval_minutes", None, "Interval of the city; default that of the table.", lower_bound=1, upper_bound=1440
)
_COLUMNS = flags.DEFINE_list(
    "columns", None, "Columns of region, time and reading in a long table; default unique_id,ds,y."
)
_TIME_ZONE = flags.DEFINE_string(
    "time_zone", None, "Time zone of the city, e.g. Europe/Berlin: clock changes are seen."
)
_TIME_FORMAT = flags.DEFINE_string("time_format", None, "How times are written, e.g. %d/%m/%Y %H:%M; default ISO 8601.")
_DUPLICATES = flags.DEFINE_enum(
    "duplicates", "refuse", ["refuse", "sum", "mean", "last"], "What to do with several readings of a region and time."
)
_ZERO_IS_MISSING = flags.DEFINE_bool("zero_is_missing", False, "A reading of 0 is none; of speeds that always holds.")
_MISSING_ABOVE = flags.DEFINE_float("missing_above", None, "Readings above this value are missing, e.g. fill values.")


def main(argv: list[str]) -> None:
    """Makes the city and writes it."""
    del argv
    # Not before: `--help` need not wait for the library.
    from gpdiff_jax import ingest
    from gpdiff_jax.cities import save_city
    from gpdiff_jax.cities.city import NAME_PATTERN
    from gpdiff_jax.errors import InputError
    from gpdiff_jax.files import user_path

    out, columns = user_path(_OUT_FILE.value), _COLUMNS.value
    if out.suffix != ".npz":
        raise InputError(f"--out_file (={out}) is no city file; name it {out.stem}.npz")
    if NAME_PATTERN.fullmatch(out.stem) is None:
        raise InputError(
            f"--out_file (={out}) names the city {out.stem!r}, and such a name is letters A to Z, digits and _.:- "
            "only; name the file otherwise"
        )
    if out.is_dir():
        raise InputError(f"--out_file (={out}) is a folder; name a file in it, as {out / 'my_city.npz'}")
    for flag in (_READINGS, _EDGES, _MATRIX, _SITES):
        given = None if flag.value is None else user_path(flag.value)
        if given is not None and given.exists() and out.exists() and given.samefile(out):
            raise InputError(f"--out_file (={out}) is --{flag.name}, which it would overwrite; name another file")
    if columns is not None and len(columns) != 3:
        raise InputError(f"--columns (={','.join(columns)}) must name three columns: of region, time and reading")
    city, facts = ingest.city_from_tables(
        _READINGS.value,
        name=out.stem,
        kind=_KIND.value,
        quantity=_QUANTITY.value,
        edges=_EDGES.value,
        matrix=_MATRIX.value,
        sites=_SITES.value,
        distances=_DISTANCES.value,
        neighbours=_NEIGHBOURS.value,
        zero_is_missing=_ZERO_IS_MISSING.value,
        missing_above=_MISSING_ABOVE.value,
        config=ingest.ReadingsConfig(
            columns=None if columns is None else (columns[0], columns[1], columns[2]),
            time_format=_TIME_FORMAT.value,
            channel=_CHANNEL.value,
            start=_START.value,
            time_zone=_TIME_ZONE.value,
            interval_minutes=_INTERVAL.value,
            duplicates=_DUPLICATES.value,
        ),
    )
    save_city(out, city)
    print("\n".join(ingest.fact_lines(facts)))
    print(f"{out}: {city.num_steps} steps of {city.interval_minutes} min, {city.num_nodes} regions, {city.unit}")


if __name__ == "__main__":
    command_line.run(main)
