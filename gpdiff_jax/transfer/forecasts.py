"""In: parameters for every region of a city, generated or fine-tuned. Out: forecasts of its test span."""

import jax
import numpy as np
from jaxtyping import Float

from gpdiff_jax.cities.city import City
from gpdiff_jax.data.target import prepare_target
from gpdiff_jax.region_parameters import RegionParameters, check_regions, model_of
from gpdiff_jax.transfer.adapt_config import AdaptConfig
from gpdiff_jax.transfer.evaluate import few_shot, zero_shot
from gpdiff_jax.typing import Key


def forecast(
    parameters: RegionParameters,
    city: City,
    *,
    adapt: AdaptConfig | None = None,
    choice: RegionParameters | None = None,
    key: Key | None = None,
) -> Float[np.ndarray, "S R P"]:
    """Forecasts every test window of a city, optionally after fine-tuning on its support days.

    Args:
      parameters: as `Hypernetwork.generate` returns them.
      city: the one-channel city whose prompts they were generated from.
      adapt: None for zero-shot; else how to fine-tune.
      choice: parameters generated from the adaptation days alone, `hypernetwork.prompts(city, adaptation_only=True)`,
        on which learning rate and steps are chosen; None chooses on `parameters`, whose prompts know the validation
        day.
      key: random key of the fine-tuning.

    Returns:
      float32 [S, R, P] in data units: for each test window and region the next P steps, averaged over the samples.

    Raises:
      InputError: the parameters are for another city, or for other regions; see `prepare_target`.

    Example:
      >>> import jax, gpdiff_jax as gpd
      >>> hypernetwork = gpd.Hypernetwork.load("runs/hangzhou/hypernetwork")  # doctest: +SKIP
      >>> parameters = hypernetwork.generate(hypernetwork.prompts(city), key=jax.random.key(0))  # doctest: +SKIP
      >>> few_shot = gpd.forecast(parameters, city, adapt=gpd.AdaptConfig())  # doctest: +SKIP
    """
    check_regions(parameters, city)
    target = prepare_target(city, parameters.data)
    model = model_of(parameters, target.sizes)
    if adapt is None:
        return zero_shot(model, target, parameters.params).forecast
    if choice is not None:
        check_regions(choice, city)
    own_key = jax.random.key(0) if key is None else key
    starts = None if choice is None else choice.params
    known = {"directions": parameters.directions, "choice_params": starts}
    return few_shot(model, target, parameters.params, adapt, key=own_key, **known).forecast
