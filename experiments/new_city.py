"""In: the folder of a trained generator and the file of a city. Out: a folder of its parameters and forecasts, a table.

Importing this module defines the flags of it. Nothing of a run is needed beside the generator.
"""

import dataclasses
import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments.run_folder import claim_folder, write_json
from experiments.stages import tell_partial_bins
from gpdiff_jax.analysis.metrics import mae
from gpdiff_jax.cities import load_city
from gpdiff_jax.errors import InputError
from gpdiff_jax.files import write_npz
from gpdiff_jax.hypernetwork import GenerateConfig, Hypernetwork
from gpdiff_jax.models import model_names, read_model_file
from gpdiff_jax.training.compilation_cache import enable_compilation_cache
from gpdiff_jax.training.parallel import use_every_core
from gpdiff_jax.transfer.evaluate import MethodForecast
from gpdiff_jax.transfer.new_city import NewCity, forecast_new_city, prepare_new_city, save_parameters

_OWN_FLAGS = ("any_kind", "city", "rolling_days")
# Of the flags of a run, those that mean the same here.
_SHARED_FLAGS = (
    "channels",
    "guidance",
    "missing_above",
    "model",
    "out_dir",
    "sampler",
    "sampler_steps",
    "samples",
    "seed",
    "support_days",
)
_MOST_ROWS = 10

flags.DEFINE_string("hypernetwork", None, "folder of a trained generator, as a run leaves it; needs --city, and no run")
flags.DEFINE_string("city", None, "the .npz file of a new city; its last --support_days are what is seen of it")
flags.DEFINE_integer(
    "rolling_days",
    0,
    "0 forecasts what comes after the city's last reading; else the last so many days, window by window, as they came",
    0,
    3650,
)


flags.DEFINE_bool("any_kind", False, "take a new city of another kind than those that the generator was trained on")


def check_flags() -> None:
    """Raises `InputError` where flags of a run and flags of a new city are mixed."""
    given = [name for name in flags.FLAGS if flags.FLAGS[name].present]
    if flags.FLAGS.hypernetwork is None:
        for name in _OWN_FLAGS:
            if name in given:
                raise InputError(f"--{name} needs --hypernetwork, the folder of a trained generator")
        return
    if flags.FLAGS.city is None:
        raise InputError("--hypernetwork needs --city, the .npz file of the city to generate for")
    ours = {flag.name for flag in flags.FLAGS.flags_by_module_dict().get("experiments.settings", [])}
    for name in given:
        if name in ours and name not in _SHARED_FLAGS:
            raise InputError(f"--{name} is of a run, and --hypernetwork takes none; leave one of the two out")


def _load(folder: str) -> tuple[Hypernetwork, str | None]:
    """The generator, and the digest of the file that its model was read from."""
    path = flags.FLAGS.model if flags.FLAGS["model"].present else None
    named, digest = None, None
    if path is not None and path.endswith(".py"):
        # Before the generator is read, which may look at its model.
        named, digest = read_model_file(path)
    hypernetwork = Hypernetwork.load(folder)
    wanted = hypernetwork.model_name
    if path is not None and (named or path) != wanted:
        raise InputError(
            f"--model {path!r} is model {named or path!r}, but {folder!r} generates {wanted!r}; leave it out"
        )
    if wanted not in model_names():
        raise InputError(
            f"{folder!r} generates model {wanted!r}, which is not built in; name its file by --model FILE.py"
        )
    return hypernetwork, digest


def generate_for_city() -> str:
    """Generates and forecasts as the flags say, and writes the folder of results.

    Returns:
      The table to print.

    Raises:
      InputError: flags that do not go together; a folder or a file that cannot be read; see `prepare_new_city`.
    """
    values = flags.FLAGS
    changes = {"samples": values.samples, "steps": values.sampler_steps}
    config = GenerateConfig(
        guidance=values.guidance,
        sampler=values.sampler,
        **{name: value for name, value in changes.items() if value is not None},
    )
    hypernetwork, model_digest = _load(values.hypernetwork)
    city = load_city(values.city, missing_above=values.missing_above)
    new_city = prepare_new_city(
        city,
        hypernetwork,
        channels=values.channels,
        support_days=values.support_days if values["support_days"].present else None,
        rolling_days=values.rolling_days,
        seed=values.seed,
        any_kind=values.any_kind,
    )
    folder = claim_folder(
        values.out_dir if values["out_dir"].present else f"runs/{city.name}", "generate.json", "forecasts"
    )
    tell_partial_bins(city, new_city.city.interval_minutes)
    silent = [new_city.city.node_ids[node] for node in new_city.target.silent]
    for region in silent:
        print(f"region {region!r} has no visible reading; it takes its neighbours' statistics", file=sys.stderr)
    parameters = hypernetwork.generate(new_city.prompts, key=jax.random.key(values.seed), config=config, any_kind=True)
    made = forecast_new_city(parameters, new_city)
    summary = _summary(new_city, made) | {
        "silent_regions": silent,
        "hypernetwork": str(pathlib.Path(values.hypernetwork).absolute()),
        "generator": json.loads(hypernetwork.summary()),
        "model_file_sha256": model_digest,
        "generate": dataclasses.asdict(config),
        "seed": values.seed,
        "device_kind": jax.devices()[0].device_kind,
    }
    # First the mark by which the folder is known, should it be written half.
    write_json(folder / "generate.json", summary)
    save_parameters(folder / "parameters", parameters, new_city)
    write_npz(folder / "forecast.npz", _arrays(new_city, made))
    return f"{_table(new_city, made, summary)}\n{folder}"


def _horizon_minutes(new_city: NewCity) -> list[int]:
    return [new_city.city.interval_minutes * step for step in range(1, new_city.data.horizon + 1)]


def _summary(new_city: NewCity, made: MethodForecast) -> dict[str, Any]:
    city, truth = new_city.city, new_city.truth
    observed = np.isfinite(truth)
    begin, end = new_city.support
    return {
        "city": city.name,
        "kind": city.kind,
        "channel": city.feature_names[0],
        "unit": city.unit,
        "interval_minutes": city.interval_minutes,
        "regions": city.num_nodes,
        "support_days": new_city.data.support_days,
        "support": [begin, end],
        "windows": len(truth),
        "window_start": [new_city.window_starts[0], new_city.window_starts[-1]],
        "horizon_minutes": _horizon_minutes(new_city),
        "forecast_mean": made.forecast.mean(axis=(0, 1)).tolist(),
        "spread_mean": None if made.spread is None else made.spread.mean(axis=(0, 1)).tolist(),
        "mae": mae(made.forecast, truth, axis=(0, 1)).tolist() if observed.any(axis=(0, 1)).all() else None,
    }


def _arrays(new_city: NewCity, made: MethodForecast) -> dict[str, np.ndarray]:
    city = new_city.city
    arrays = {
        "forecast": made.forecast,
        "window_start": np.asarray(new_city.window_starts),
        "node_ids": np.asarray(city.node_ids),
        "horizon_minutes": np.asarray(_horizon_minutes(new_city)),
        "unit": np.asarray(city.unit),
        "truth": new_city.truth,
    }
    return arrays if made.spread is None else arrays | {"spread": made.spread}


def _table(new_city: NewCity, made: MethodForecast, summary: dict[str, Any]) -> str:
    """The last window's forecasts of some regions, and the error of all windows where it is known, as plain text."""
    first, last = summary["window_start"]
    windows = f"from {first}" if summary["windows"] == 1 else f"{summary['windows']} windows, {first} to {last}"
    lines = [
        f"{summary['city']}: {summary['regions']} regions, seen from {' to '.join(summary['support'])}",
        f"{summary['unit']}, forecast {windows}" + ("; the last:" if summary["windows"] > 1 else ""),
        f"{'region':24s}" + "".join(f"{f'+{minutes} min':>18s}" for minutes in summary["horizon_minutes"]),
    ]
    for node, name in list(enumerate(new_city.city.node_ids))[:_MOST_ROWS]:
        cells = [f"{value:.4g}" for value in made.forecast[-1, node]]
        if made.spread is not None:
            cells = [f"{cell} ± {value:.2g}" for cell, value in zip(cells, made.spread[-1, node], strict=True)]
        lines.append(f"{name:24.24s}" + "".join(f"{cell:>18s}" for cell in cells))
    if summary["regions"] > _MOST_ROWS:
        lines.append(f"and {summary['regions'] - _MOST_ROWS} more regions in forecast.npz")
    if summary["mae"] is not None:
        lines.append(f"{'mean absolute error':24s}" + "".join(f"{value:18.4g}" for value in summary["mae"]))
    return "\n".join(lines)


def new_city_main() -> None:
    """Sets up the machine, generates and prints the table."""
    use_every_core()
    enable_compilation_cache()
    print(generate_for_city())
