"""In: the flags that name a trained generator and the file of a city. Out: a folder of its forecasts, and a table.

Importing this module defines the flags of it. Nothing of a run is needed beside the generator.
"""

import dataclasses
import json
import pathlib

import jax
from absl import flags

from gpdiff_jax import GenerateConfig, InputError, forecast_new_city, load_city, prepare_new_city
from gpdiff_jax.run.folder import claim_folder
from gpdiff_jax.run.new_city import (
    forecast_table,
    load_generator,
    notes_above,
    notes_of,
    print_notes,
    write_forecasts,
)
from gpdiff_jax.training.compilation_cache import enable_compilation_cache
from gpdiff_jax.training.parallel import use_every_core

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
    "shrinkage",
    "support_days",
)

flags.DEFINE_string(
    "hypernetwork",
    None,
    "folder of a trained generator, as a run leaves it; with --city the package's own if not given",
)
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
    if flags.FLAGS.city is None:
        for name in ("hypernetwork", *_OWN_FLAGS):
            if name in given:
                raise InputError(f"--{name} needs --city, the .npz file of the city to generate for")
        return
    ours = {flag.name for flag in flags.FLAGS.flags_by_module_dict().get("experiments.run_flags", [])}
    for name in given:
        if name in ours and name not in _SHARED_FLAGS:
            raise InputError(f"--{name} is of a run, and --city takes none; leave one of the two out")


def new_city_main() -> None:
    """Generates and forecasts as the flags say, writes the folder of results and prints the table.

    Raises:
      InputError: flags that do not go together; a folder or a file that cannot be read; see `prepare_new_city`.
    """
    use_every_core()
    enable_compilation_cache()
    values = flags.FLAGS
    changes = {"samples": values.samples, "steps": values.sampler_steps, "sampler": values.sampler}
    changes["shrinkage"] = values.shrinkage
    config = GenerateConfig(
        guidance=values.guidance,
        **{name: value for name, value in changes.items() if value is not None},
    )
    hypernetwork, model_digest = load_generator(values.hypernetwork, values.model if values["model"].present else None)
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
    print_notes([*notes_above(values.city, values.missing_above), *notes_of(city, new_city)])
    parameters = hypernetwork.generate(new_city.prompts, key=jax.random.key(values.seed), config=config, any_kind=True)
    made = forecast_new_city(parameters, new_city)
    write_forecasts(
        folder,
        new_city,
        parameters,
        made,
        {
            "hypernetwork": values.hypernetwork and str(pathlib.Path(values.hypernetwork).absolute()),
            "generator": json.loads(hypernetwork.summary()),
            "model_file_sha256": model_digest,
            "generate": dataclasses.asdict(config) | {"shrinkage": config.kept(hypernetwork.data.covariates)},
            "seed": values.seed,
        },
    )
    print(f"{forecast_table(new_city, made)}\n{folder}")
