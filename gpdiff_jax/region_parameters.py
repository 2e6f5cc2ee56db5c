"""In: parameters that were made for the regions of a city. Out: what they are, and whether they are for others."""

import itertools

import flax.struct
import jax
import numpy as np
from jaxtyping import Array, Float

from gpdiff_jax.cities.city import City, CityLabel, label_of
from gpdiff_jax.data.config import DataConfig
from gpdiff_jax.errors import InputError
from gpdiff_jax.models.protocol import Model, ModelSizes, abstract_params
from gpdiff_jax.models.registry import make_model
from gpdiff_jax.training.stored_form import check_arrays, shapes_of
from gpdiff_jax.typing import Params


@flax.struct.dataclass
class RegionParameters:
    """K parameter vectors for each of R regions, with what is needed to forecast with them."""

    params: Params  # leaves [K, R, ...]
    model: str = flax.struct.field(pytree_node=False)
    data: DataConfig = flax.struct.field(pytree_node=False)
    # Whose regions they are for; None where that is not known.
    city: CityLabel | None = flax.struct.field(pytree_node=False, default=None)
    directions: Params | None = None  # of the zoo, leaves [n, ...], along which they can be fine-tuned
    residuals: Float[Array | np.ndarray, "P X"] | None = None  # of the sources, see `zoo.residuals.source_residuals`

    def __repr__(self) -> str:
        """What they are, without their numbers."""
        shape = getattr(next(iter(jax.tree.leaves(self.params)), None), "shape", ())
        size = f"{shape[0]} samples x {shape[1]} regions" if len(shape) > 1 else "no regions"
        return f"<RegionParameters of model {self.model!r}: {size}>"


def model_of(parameters: RegionParameters, sizes: ModelSizes) -> Model:
    """The model that parameters are for.

    Args:
      parameters: of the regions of a city.
      sizes: what the model must fit.

    Returns:
      The model as it is registered.

    Raises:
      InputError: the parameters have other shapes than it has, or no model of that name is registered.
    """
    model = make_model(parameters.model, sizes)
    shapes = shapes_of(abstract_params(model, sizes), (None, None))
    try:
        check_arrays(parameters.params, shapes, "params", values="any")
    except InputError as error:
        raise InputError(f"the parameters are not those of the model {parameters.model!r}: {error}") from error
    return model


def check_regions(parameters: RegionParameters, city: City) -> None:
    """Refuses parameters that were made for other regions than those of a city, or for these in another order.

    Raises:
      InputError: names the first difference.
    """
    own, made_for = label_of(city), parameters.city
    count, remedy = jax.tree.leaves(parameters.params)[0].shape[1], "generate them from this city's prompts"
    if made_for is not None:
        for what, have, want in (
            ("the name of its city", made_for.name, own.name),
            ("its channel", made_for.channel, own.channel),
            ("its minutes between readings", made_for.interval_minutes, own.interval_minutes),
        ):
            if have != want:
                raise InputError(f"the parameters are for another city: {what} is {have!r}, not {want!r}; {remedy}")
        for number, (have, want) in enumerate(itertools.zip_longest(made_for.node_ids, own.node_ids)):
            if have != want:
                raise InputError(
                    f"region {number} of the parameters is {have!r} and of city {city.name!r} {want!r}; parameters "
                    f"hold for their own regions in their own order: {remedy}"
                )
    if count != city.num_nodes:
        raise InputError(
            f"the parameters are for {count} regions and city {city.name!r} has {city.num_nodes}; {remedy}"
        )
