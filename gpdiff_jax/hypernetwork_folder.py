"""In: a folder that `Hypernetwork.save` wrote, or that says so. Out: the fields of the generator, or why it is none."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.diffusion.denoiser import DenoiserConfig, make_denoiser
from gpdiff_jax.errors import InputError
from gpdiff_jax.models.protocol import ModelSizes, abstract_params
from gpdiff_jax.models.registry import make_model, model_names
from gpdiff_jax.prompts.encoders import PromptEncoder
from gpdiff_jax.prompts.prompt import PromptScaler
from gpdiff_jax.training.caches import bounded_cache
from gpdiff_jax.training.storage import in_single, load_arrays
from gpdiff_jax.training.stored_form import Shape, building, check_arrays, check_facts, form_of, shapes_of, to_device
from gpdiff_jax.typing import Params
from gpdiff_jax.zoo.codec import SPACES, Codec
from gpdiff_jax.zoo.tokens import TokenLayout, check_layout, make_layout

FORMAT = 7
CODEC_ARRAYS = ("pooled_tokens", "mean_difference", "scale")
_WHAT = "hypernetwork"
_MOST_ENTRIES = 10**7  # of what a model sees at once
_FACTS = {
    "model": str,
    "sizes": {"history": int, "horizon": int, "num_inputs": int, "num_covariates": int, "anomaly": (bool, None)},
    "data": form_of(dataclasses.asdict(DataConfig())),
    "denoiser": form_of(dataclasses.asdict(DenoiserConfig())),
    "components": bool,
    "space": (str, None),
    "prompt_names": [str],
    "prompt_spatial": ([int], None),
    "interval_minutes": (int, None),
    "kinds": ([str], None),
    "speed_units": ([str], None),
    "identity": (str, None),
}


def read_fields(folder: str | pathlib.Path) -> dict[str, Any]:
    """Reads the fields of a generator, and checks that they go together.

    Args:
      folder: where it lies.

    Returns:
      What `Hypernetwork` is made of, by name; arrays on the device.

    Raises:
      InputError: see `Hypernetwork.load`.
    """
    arrays, facts = load_arrays(pathlib.Path(folder), FORMAT, _WHAT)
    with building(_WHAT, folder):
        check_facts(facts, _FACTS)
        made = _fields(arrays, facts, f"the {_WHAT} at {str(folder)!r}")
    _check_model(made["model_name"], made["sizes"], made["codec"].layout, f"the {_WHAT} at {str(folder)!r}")
    return made


def _check_model(name: str, sizes: ModelSizes, layout: TokenLayout, what: str) -> None:
    """Refuses a layout that is not that of the model as it is today, as far as it is registered."""
    if name in model_names():
        model = make_model(name, sizes)
        today = abstract_params(model, sizes)
        check_layout(layout, make_layout(today, layout.width, model.layer_kinds(today)), what, f"the model {name!r}")


def _fields(arrays: dict[str, Any], facts: dict[str, Any], what: str) -> dict[str, Any]:
    arrays = in_single(arrays)
    sizes, names = ModelSizes(**facts["sizes"]), tuple(facts["prompt_names"])
    seen = sizes.history * sizes.num_inputs + (sizes.history + sizes.horizon) * (sizes.num_covariates + 1)
    if min(sizes[:3]) < 1 or sizes.num_covariates < 0 or seen > _MOST_ENTRIES:
        raise InputError(f"`sizes` is {facts['sizes']}")
    if facts.get("interval_minutes") is not None and facts["interval_minutes"] < 1:
        raise InputError(f"`interval_minutes` is {facts['interval_minutes']}")
    spatial = tuple(facts.get("prompt_spatial") or ())
    if len(spatial) not in (0, len(names)):
        raise InputError(f"`prompt_spatial` has {len(spatial)} entries, and a prompt {len(names)}")
    layout, pooled = TokenLayout.from_json(facts["layout"]), arrays["pooled"]
    own_kinds = dict(zip(layout.layers, layout.kinds, strict=True))
    check_layout(layout, make_layout(pooled, layout.width, own_kinds), what, "its pooled model")
    check_arrays(pooled, shapes_of(pooled), "pooled")
    # An entry that never varied is divided by infinity.
    check_arrays(arrays["prompts"], {"mean": (len(names),), "std": (len(names),)}, "prompts", values="numbers")
    codec = _codec(arrays["codec"], layout, facts["components"], facts.get("space") or SPACES[0])
    config = DenoiserConfig(**facts["denoiser"])
    _check_variables(arrays["variables"], config, codec, spatial, len(names))
    if "directions" in arrays:
        check_arrays(arrays["directions"], shapes_of(pooled, (None,)), "directions")
    if "residuals" in arrays:
        # NaN where no source has a reading to validate on.
        check_arrays(arrays["residuals"], {"": (sizes.horizon, None)}, "residuals", values="any")
    encoder = PromptEncoder.from_arrays(arrays.get("prompt_encoder") or {}, facts["prompt_encoder"])
    names_of_others = ("variables", "prompts", "directions", "residuals")
    arrays = to_device({name: arrays[name] for name in names_of_others if name in arrays})
    return {
        "model_name": facts["model"],
        "sizes": sizes,
        "data": DataConfig.from_json(facts["data"]),
        "denoiser_config": config,
        "variables": arrays["variables"],
        "codec": codec,
        "prompt_scaler": PromptScaler(**arrays["prompts"]),
        "prompt_names": names,
        "prompt_spatial": spatial,
        "prompt_encoder": encoder,
        "interval_minutes": facts.get("interval_minutes"),
        "kinds": None if facts.get("kinds") is None else tuple(facts["kinds"]),
        "speed_units": tuple(facts.get("speed_units") or ()),
        "identity": facts.get("identity"),
        "directions": arrays.get("directions"),
        "residuals": arrays.get("residuals"),
    }


def _codec(arrays: dict[str, Any], layout: TokenLayout, components: bool, space: str) -> Codec:
    if space not in SPACES:
        raise InputError(f"`space` is {space!r}, not one of {', '.join(SPACES)}")
    # A layer that does not vary has no directions, and no array on disk.
    tokens = [layout.layer_of_token.count(layer) for layer in range(len(layout.layers))]
    entries = [count * layout.width for count in (tokens if space == "layers" else [layout.num_tokens])]
    found = arrays.get("basis") or {}
    every = {f"basis/{layer}": (None, count) for layer, count in enumerate(entries)}
    for layer, rows in found.items():
        check_arrays({"basis": {layer: rows}}, {f"basis/{layer}": every.get(f"basis/{layer}", ())}, "codec")
    kept = {name: arrays[name] for name in CODEC_ARRAYS}
    check_arrays(kept, dict.fromkeys(CODEC_ARRAYS, (layout.num_tokens, layout.width)), "codec")
    kept, found = to_device((kept, found))
    basis = tuple(found.get(str(layer), jnp.zeros((0, count))) for layer, count in enumerate(entries))
    return Codec(basis=basis if components else (), layout=layout, space=space, **kept)


def _check_variables(
    variables: Params, config: DenoiserConfig, codec: Codec, spatial: tuple[int, ...], entries: int
) -> None:
    count = len(jax.tree.leaves(variables))
    if config.layers > count:  # so many layers would be traced for ever
        raise InputError(f"`denoiser.layers` is {config.layers}, and there are {count} arrays of variables")
    denoiser: Any = make_denoiser(config, codec, spatial)
    shapes = (1, len(codec.filled), codec.width), (1,), (1, entries), (1,)
    example = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    check_arrays(variables, _shapes(denoiser, *example), "variables")


@bounded_cache(32)
def _shapes(denoiser: Any, *example: jax.ShapeDtypeStruct) -> dict[str, Shape]:
    today: Any = jax.eval_shape(denoiser.init, jax.random.key(0), *example)
    return shapes_of(today["params"])
