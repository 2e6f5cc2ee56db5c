"""In: cities and the spans that may be seen. Out: prompts of their regions, and their scale over the sources."""

import dataclasses
from collections.abc import Callable, Sequence

import flax.struct
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from gpdiff_jax.cities.city import City, CityLabel, label_of
from gpdiff_jax.cities.scaling import silent_regions
from gpdiff_jax.cities.splits import Span, split_target
from gpdiff_jax.errors import InputError
from gpdiff_jax.prompts.encoders import PromptEncoder, columns_of_parts, plain_encoder

_CLIP = 4.0


@flax.struct.dataclass
class PromptScaler:
    """Mean and deviation of every prompt entry over the source regions."""

    mean: Float[Array, "*devices E"]
    std: Float[Array, "*devices E"]


@flax.struct.dataclass
class Prompts:
    """What conditions the generator: a description of R regions, each seen through V variants (one for a target)."""

    values: Float[Array, "*devices V R E"]  # unscaled
    region_ids: UInt32[Array, "*devices R"]  # what seeds a region's randomness
    names: tuple[str, ...] = flax.struct.field(pytree_node=False)  # E
    # Per city, what they were made from: "melbourne steps 120 to 192, 300 to 372".
    provenance: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())
    mask: Bool[Array, "*devices R"] | None = None  # False where a prompt is hidden from the generator; None hides none
    # E, 1 where an entry says where a region lies, 0 where it says how it behaves; empty where nobody says.
    spatial: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
    # Whose regions they are; empty where that is not known.
    cities: tuple[CityLabel, ...] = flax.struct.field(pytree_node=False, default=())

    @property
    def parts(self) -> dict[str, Int[np.ndarray, " X"]]:
        """The entries of every part, by its name: "statistics", "temporal", "spatial"."""
        return columns_of_parts(self.names)

    def variant(self, index: int) -> "Prompts":
        """The same regions seen through one of the V variants, values [1, R, E]."""
        return dataclasses.replace(self, values=self.values[index : index + 1])

    @property
    def null(self) -> "Prompts":
        """The same regions with their prompts hidden from the generator: what guidance pushes away from."""
        return dataclasses.replace(self, mask=jax.device_put(np.zeros(self.values.shape[1], bool)))


def region_prompts(city: City, spans: Sequence[Span], encoder: PromptEncoder | None = None) -> Prompts:
    """Prompts of all regions of a city, one for each visible span.

    Args:
      city: a one-channel city.
      spans: V spans that may be seen.
      encoder: of the parts of a prompt; None for statistics alone.

    Returns:
      float32 [V, N, E]: the parts side by side. A region without a reading in a span takes the statistics of its
      neighbours; its spatial part is made of what the graph knows of it.

    Raises:
      InputError: nobody has a reading in a span, or a part cannot be made of the city (`check_parts`).
    """
    values, names, spatial, seen = _region_tables(city, spans, encoder)
    values, region_ids = jax.device_put((values, city.region_ids()))
    return Prompts(values, region_ids, names, (seen,), spatial=spatial, cities=(label_of(city),))


def _region_tables(
    city: City, spans: Sequence[Span], encoder: PromptEncoder | None
) -> tuple[Float[np.ndarray, "V N E"], tuple[str, ...], tuple[int, ...], str]:
    """Values of the prompts of a city on the host, names and kinds of their entries, and what they were made from."""
    encoder = encoder or plain_encoder()
    made = encoder.regions_by_span(city, spans)
    seen = f"{city.name} steps " + ", ".join(f"{span.start} to {span.stop}" for span in spans)
    return np.stack([table.values for table in made]), made[0].names, made[0].spatial, seen


def source_prompts(
    cities: Sequence[City],
    spans: Sequence[Sequence[Span]],
    train_spans: Sequence[Span],
    encoder: PromptEncoder | None = None,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> Prompts:
    """Prompts of the source regions, from random windows as long as the support days of a target.

    Args:
      cities: one-channel source cities.
      spans: per city, the V windows.
      train_spans: per city, its training span; regions without a reading there are left out, as in harvest.
      encoder: of the parts of a prompt; None for statistics alone.
      progress: called with (cities done, {}).

    Returns:
      float32 [V, R, E].

    Raises:
      InputError: no city; or see `region_prompts`.
    """
    if not cities:
        raise InputError("`cities` is empty; name at least one source city")
    parts = []
    for done, (city, city_spans, train) in enumerate(zip(cities, spans, train_spans, strict=True), 1):
        kept = ~silent_regions(city, train)
        values, names, spatial, seen = _region_tables(city, city_spans, encoder)
        parts.append((values[:, kept], city.region_ids()[kept], names, spatial, seen, label_of(city, kept)))
        if progress:
            progress(done, {})
    tables, ids, names, spatial, seen, labels = zip(*parts, strict=True)
    values, region_ids = jax.device_put((np.concatenate(tables, axis=1), np.concatenate(ids)))
    return Prompts(values, region_ids, names[0], seen, spatial=spatial[0], cities=labels)


def target_prompts(
    city: City,
    *,
    support_days: int,
    history: int = 12,
    horizon: int = 6,
    encoder: PromptEncoder | None = None,
    adaptation_only: bool = False,
    protocol: str = "leak-free",
) -> Prompts:
    """Prompts of a target city from its support days, right before the test span.

    Args:
      city: a one-channel city.
      support_days: its visible days.
      history: H of the forecaster.
      horizon: P of the forecaster.
      encoder: of the parts of a prompt; None for statistics alone.
      adaptation_only: leave the validation days out, as whatever is chosen on them needs it.
      protocol: how the city is split, see `DataConfig`.

    Returns:
      float32 [1, N, E].

    Raises:
      InputError: see `split_target`, and `region_prompts`; or a single support day, which has no adaptation days.

    Example:
      >>> import gpdiff_jax as gpd
      >>> city = gpd.simulate_cities(gpd.SimulationConfig(cities=1, regions=6, days=14), seed=0)[0]
      >>> gpd.target_prompts(city, support_days=3).values.shape
      (1, 6, 49)
    """
    split = split_target(
        city.num_steps,
        city.steps_per_day,
        support_days,
        history=history,
        horizon=horizon,
        name=city.name,
        protocol=protocol,
    )
    if adaptation_only and not len(split.adaptation):
        raise InputError(
            f"`support_days` (={support_days}) leave no adaptation days beside those of validation; use more days"
        )
    return region_prompts(city, [split.adaptation if adaptation_only else split.support], encoder)


def fit_prompt_scaler(prompts: Prompts, city_index: Int[np.ndarray, " R"]) -> PromptScaler:
    """Statistics of the source prompts, every city with the same weight.

    Args:
      prompts: of the source regions.
      city_index: [R], the city of every region.

    Returns:
      The scaler. The deviation holds what separates cities and what separates regions.
    """
    return PromptScaler(*jax.device_put(scale_of(np.asarray(prompts.values), city_index)))


def scale_prompts(prompts: Prompts, scaler: PromptScaler) -> Float[Array, "V R E"]:
    """Prompts in deviations of the sources, cut at four: beyond, a distance carries no more information."""
    values, mean, std = (np.asarray(part) for part in (prompts.values, scaler.mean, scaler.std))
    return jax.device_put(in_scale(values, (mean, std)))


def scale_of(
    values: Float[np.ndarray, "V R E"], city_index: Int[np.ndarray, " R"]
) -> tuple[Float[np.ndarray, " E"], Float[np.ndarray, " E"]]:
    """Mean and deviation of `fit_prompt_scaler`, of values on the host."""
    rows = [values[:, city_index == index].astype(np.float64) for index in np.unique(city_index)]
    mean = np.mean([table.mean(axis=(0, 1)) for table in rows], axis=0)
    variance = np.mean([np.square(table - mean).mean(axis=(0, 1)) for table in rows], axis=0)
    # What is the same in all sources, as the length of windows may be, says nothing: it is divided by infinity.
    std = np.where(np.ptp(values, axis=(0, 1)) > 0, np.sqrt(variance) + 1e-3, np.inf)
    return mean.astype(np.float32), std.astype(np.float32)


def in_scale(
    values: Float[np.ndarray, "V R E"], scale: tuple[Float[np.ndarray, " E"], Float[np.ndarray, " E"]]
) -> Float[np.ndarray, "V R E"]:
    """What `scale_prompts` makes, of values on the host and the mean and deviation of `scale_of`."""
    mean, std = scale
    return np.clip((values - mean) / std, -_CLIP, _CLIP)
