"""How well the temporal encoder reconstructs hidden patches, and how well prompts tell regions apart, city by city.

    python -m benchmarks.prompts [--quick] [--data_dir DIR] [--cities a,b,c] [--held_out c] [--interval_minutes 60]

Every held-out city is measured with an encoder pre-trained on the others. Without --data_dir and GPDIFF_DATA, cities
are simulated. The error is that of hidden patches (75 % of them), in standard deviations of the region, over windows
of several lengths; its peers, straight lines between the visible readings and the mean of the visible patches at the
same time of day, fill in the same patches of the same windows. Recall is the share of regions whose prompt in one
window is nearest to (or among the five nearest to) their own in another window that shares no step with it.
`value` is the mean over seeds, `deviation` their standard deviation.
"""

import time
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags

from benchmarks.cities import cities_of_flags, held_out_names
from benchmarks.measuring import print_line
from experiments import command_line
from gpdiff_jax.analysis.measures import (
    disjoint_windows,
    hidden_error,
    hide_patches,
    interpolate_visible,
    join_parts,
    profile_of_visible,
    recall_at,
)
from gpdiff_jax.cities import City
from gpdiff_jax.cities.splits import Span, split_source
from gpdiff_jax.prompts.statistics import temporal_statistics
from gpdiff_jax.prompts.temporal.autoencoder import TemporalConfig
from gpdiff_jax.prompts.temporal.encoder import TemporalEncoder, encode, pretrain_encoder, reconstruct
from gpdiff_jax.prompts.temporal.patches import cut_patches

flags.DEFINE_bool("quick", False, "one held-out city, one seed, fewer steps and windows; ends within two minutes")
flags.DEFINE_string("data_dir", None, "folder of city files; default GPDIFF_DATA, and without that simulated cities")
flags.DEFINE_list(
    "cities",
    ["beijing_metro", "melbourne_pedestrians", "nyc_bike_2014", "nyc_taxi_zones_2018", "hangzhou_metro"],
    "the cities of a folder to take",
)
flags.DEFINE_list("held_out", None, "cities to hold out, one after another; all if not given")
flags.DEFINE_integer("interval_minutes", 60, "interval that cities are resampled to; 0 keeps every city's own", 0, 60)
flags.DEFINE_integer("days", 3, "days of the windows in which regions are recognised", 1, 14)
flags.DEFINE_integer("pairs", 6, "pairs of such windows per city", 1)
flags.DEFINE_integer("seeds", 3, "times that the encoder is pre-trained", 1)
flags.DEFINE_integer("steps", TemporalConfig().steps, "pre-training steps", 1)

_LENGTHS = (1, 3, 7, 14)  # days of the windows that are reconstructed
_RANKS = (1, 5)
_PEERS = ("linear interpolation", "daily profile of the visible patches")


def _windows(city: City, days: int, pairs: int) -> list[tuple[Span, Span]]:
    return disjoint_windows(city, Span(0, city.num_steps), days, pairs, key=jax.random.key(3))


def _reconstruction(encoder: TemporalEncoder, city: City, days: int, pairs: int) -> np.ndarray:
    """Mean absolute and root mean squared error [3, 2] of the encoder and its two peers."""
    config, errors = encoder.config, []
    for index, window in enumerate(window for pair in _windows(city, days, pairs) for window in pair):
        patches = cut_patches(city, window, config.patch_minutes, config.bins)
        visible = hide_patches(patches, config.masked_share, key=jax.random.fold_in(jax.random.key(4), index))
        made = (
            reconstruct(encoder, patches, visible),
            interpolate_visible(patches, visible),
            profile_of_visible(patches, visible, config.patches_per_day),
        )
        errors.append([hidden_error(values, patches, visible) for values in made])
    return np.mean(errors, axis=0)


def _recall(encoder: TemporalEncoder, city: City, days: int, pairs: int) -> dict[str, np.ndarray]:
    """Recall at the ranks, for statistics, encoder and both."""
    found: dict[str, list[list[float]]] = {"statistics": [], "encoder": [], "both": []}
    for pair in _windows(city, days, pairs):
        parts = [(temporal_statistics(city, window)[0], encode(encoder, city, window)) for window in pair]
        for name, chosen in (("statistics", [0]), ("encoder", [1]), ("both", [0, 1])):
            first, second = (join_parts([part[index] for index in chosen]) for part in parts)
            found[name].append(list(recall_at(first, second, _RANKS).values()))
    return {name: np.mean(rows, axis=0) for name, rows in found.items()}


def _print_errors(city: City, days: int, errors: np.ndarray) -> None:
    """Errors [seeds, 3, 2] as lines."""
    for metric, column in (("masked_mean_absolute_error", 0), ("masked_root_mean_squared_error", 1)):
        ours = errors[:, 0, column]
        for row, peer in enumerate(_PEERS, start=1):
            theirs = float(errors[:, row, column].mean())
            more = {"deviation": float(ours.std()), "peer": peer, "peer_value": theirs}
            ratio = theirs / float(ours.mean())
            print_line("prompts", f"{city.name}_{days}_days", metric, float(ours.mean()), "1", **more, ratio=ratio)


def _print_recall(city: City, days: int, recalls: Sequence[dict[str, np.ndarray]]) -> None:
    for index, rank in enumerate(_RANKS):
        values = {name: np.asarray([recall[name][index] for recall in recalls]) for name in recalls[0]}
        reference = float(values["statistics"].mean())
        for name, value in values.items():
            more = {"deviation": float(value.std())}
            if name != "statistics":
                more |= {
                    "peer": "statistics",
                    "peer_value": reference,
                    "ratio": float(value.mean()) / max(reference, 1e-9),
                }
            case = f"{city.name}_{days}_days_{name}"
            print_line("prompts", case, f"recall@{rank}", float(value.mean()), "1", **more)


def main(argv: list[str]) -> None:
    """Pre-trains without every held-out city in turn, and measures on it."""
    del argv
    quick, cities = flags.FLAGS.quick, cities_of_flags()
    seeds, pairs = (1, 2) if quick else (flags.FLAGS.seeds, flags.FLAGS.pairs)
    config = TemporalConfig(steps=min(flags.FLAGS.steps, 400) if quick else flags.FLAGS.steps)
    for name in held_out_names(cities):
        city = next(one for one in cities if one.name == name)
        sources = [other for other in cities if other.name != name]
        spans = [split_source(source.num_steps, history=12, horizon=6, name=source.name).train for source in sources]
        encoders, seconds = [], []
        for seed in range(seeds):
            begin = time.perf_counter()
            encoders.append(pretrain_encoder(sources, spans, config, key=jax.random.key(seed)))
            seconds.append(time.perf_counter() - begin)
        print_line("prompts", f"without_{name}", "pretraining", float(np.median(seconds)), "s")
        for days in _LENGTHS:
            if city.num_steps >= 2 * days * city.steps_per_day:
                errors = np.stack([_reconstruction(encoder, city, days, pairs) for encoder in encoders])
                _print_errors(city, days, errors)
        recalls = [_recall(encoder, city, flags.FLAGS.days, pairs) for encoder in encoders]
        _print_recall(city, flags.FLAGS.days, recalls)


if __name__ == "__main__":
    command_line.run(main)
