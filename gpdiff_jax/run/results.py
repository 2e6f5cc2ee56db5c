"""In: a run whose generator is trained. Out: its forecasts and errors, as the files that an output folder holds."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from gpdiff_jax.analysis.metrics import REGION_COLUMNS, method_entry, region_rows
from gpdiff_jax.cities.city import City
from gpdiff_jax.cities.splits import Span
from gpdiff_jax.files import write_csv, write_json, write_npz
from gpdiff_jax.hosts import is_first
from gpdiff_jax.pretraining import tokens_of
from gpdiff_jax.report import render_report
from gpdiff_jax.run.methods import held_methods, method_forecast, training_stages
from gpdiff_jax.run.outside import region_names
from gpdiff_jax.run.settings import METHODS, Settings
from gpdiff_jax.run.stages import Stages
from gpdiff_jax.training.exchange import ask_first
from gpdiff_jax.transfer.evaluate import MethodForecast, observed_truth, step_names, window_start_names
from gpdiff_jax.typing import Params
from gpdiff_jax.vectors import evenly, principal_axes

_GENERATED = ("gpdiff_zero_shot", "gpdiff_few_shot", "gpdiff_posterior_few_shot")
_ROWS = 1024  # vectors that the principal axes are made of, and that are looked at at a time
_TUNED = ("learning_rate", "steps", "validation_mae", "shared_steps", "shared_rate")
_SILENT_NOTE = "no visible reading: generated from its neighbours' statistics"
PAPER_NOTE = (
    "the paper's protocol, not leak-free: scaled by the whole series, and what is chosen is chosen on the test; for "
    "comparison alone"
)


def evaluate(run: Stages) -> dict[str, Any]:
    """Makes the forecasts of every chosen method that the folder does not hold yet, and writes all results.

    What the folder holds of other methods stays among the results.

    Args:
      run: the run.

    Returns:
      What metrics.json holds.
    """
    channels = range(len(run.targets))
    held = held_methods(run)
    methods = [method for method in METHODS if method in {*run.settings.methods, *held}]
    methods += [method for method in held if method not in METHODS]
    results = {method: [method_forecast(run, channel, method) for channel in channels] for method in methods}
    truths = [observed_truth(city, target) for city, target in zip(run.target_cities, run.targets, strict=True)]
    weekend = truths[0][1]
    truth = np.concatenate([values for values, _ in truths], axis=1)
    content = _describe(run)
    seconds = run.seconds
    # What other programs took is not known.
    training = {
        method: sum((seconds.get(name, 0.0) for name in training_stages(method, run.settings.adapt)), start=0.0)
        if method in METHODS
        else None
        for method in results
    }
    scales = _channel_scales(run, truths)
    content["methods"] = {
        method: _entry(
            [part._replace(forecast=part.forecast / scale) for part, scale in zip(parts, scales, strict=True)],
            np.concatenate([values / scale for (values, _), scale in zip(truths, scales, strict=True)], axis=1),
            weekend,
            training[method],
        )
        for method, parts in results.items()
    }
    if len(run.target_cities) > 1:
        content["channels"] = {
            city.feature_names[0]: {
                "unit": city.unit,
                "methods": {
                    method: _entry([parts[c]], truths[c][0], weekend, training[method])
                    for method, parts in results.items()
                },
            }
            for c, city in enumerate(run.target_cities)
        }
    rows = [
        row
        for method, parts in results.items()
        for city, target, part, (values, _) in zip(run.target_cities, run.targets, parts, truths, strict=True)
        for row in region_rows(
            part.forecast,
            values,
            is_weekend=weekend,
            method=method,
            regions=city.node_ids,
            channel=city.feature_names[0],
            notes=[_note(run, node in target.silent) for node in range(city.num_nodes)],
        )
    ]
    write_csv(run.folder / "regions.csv", REGION_COLUMNS, rows)
    write_npz(run.folder / "forecasts.npz", _forecast_arrays(run, results, truth))
    write_npz(run.folder / "report.npz", _report_arrays(run))
    write_json(run.folder / "metrics.json", content)
    if is_first():
        render_report(run.folder)
    return content


def _describe(run: Stages) -> dict[str, Any]:
    city, settings = run.target_cities[0], run.settings
    return {
        "target": settings.target or city.name,
        "target_kind": city.kind,
        "unit": _unit(run),
        "horizon_minutes": _horizon_minutes(settings),
        "seed": settings.seed,
        "covariates": settings.data.covariates,
        "support_days": settings.data.support_days,
        "support": _ends(city, run.targets[0].split.support),
        "test": _ends(city, run.targets[0].split.test),
        "sources": [source.name for source in run.source_cities],
        "protocol": settings.data.protocol,
        "regions": sum(target.num_regions for target in run.targets),
        "test_windows": len(run.targets[0].test_starts),
        "silent_regions": [
            node_id
            for city, target in zip(run.target_cities, run.targets, strict=True)
            for node_id in region_names(run, city, target.silent)
        ],
    }


def _ends(city: City, span: Span) -> list[str]:
    """Local begin of the first interval of a span, and end of its last."""
    return step_names(city, np.asarray([span.start, span.stop]))


def _horizon_minutes(settings: Settings) -> list[int]:
    """When the steps of a forecast end, after its last reading."""
    return [settings.interval_minutes * step for step in range(1, settings.data.horizon + 1)]


def _note(run: Stages, silent: bool) -> str:
    """The remark on a region in regions.csv."""
    published = run.settings.data.protocol == "paper"
    return "; ".join([*([PAPER_NOTE] if published else []), *([_SILENT_NOTE] if silent else [])])


_SHARE = "share of the channel's mean reading"


def _unit(run: Stages) -> str:
    """The unit of the errors over all channels: their own, or none where they differ."""
    units = {city.unit for city in run.target_cities}
    return units.pop() if len(units) == 1 else _SHARE


def _channel_scales(run: Stages, truths: list[tuple[np.ndarray, Any]]) -> list[float]:
    """What the readings of every channel are divided by, so that errors of different units can be averaged."""
    if _unit(run) != _SHARE:
        return [1.0] * len(truths)
    # A channel that reads nothing but zeros has no mean to be a share of.
    return [float(np.nanmean(np.abs(values))) or 1.0 for values, _ in truths]


def _entry(
    parts: list[MethodForecast], truth: np.ndarray, weekend: np.ndarray | None, training_seconds: float | None
) -> dict[str, Any]:
    # Of several channels, each is tuned on its own.
    tuned = parts[0]._asdict() if len(parts) == 1 else {}
    return method_entry(
        np.concatenate([part.forecast for part in parts], axis=1),
        truth,
        is_weekend=weekend,
        seconds=sum(part.seconds for part in parts),
        training_seconds=training_seconds,
        **{name: tuned.get(name) for name in _TUNED},
    )


def _forecast_arrays(run: Stages, results: dict[str, list[MethodForecast]], truth: np.ndarray) -> dict[str, np.ndarray]:
    arrays = {
        "window_start": np.asarray(window_start_names(run.target_cities[0], run.targets[0])),
        "node_ids": np.asarray([name for city in run.target_cities for name in region_names(run, city)]),
        "truth": truth,
        "protocol": np.asarray(run.settings.data.protocol),
        "unit": np.asarray([city.unit for city in run.target_cities for _ in city.node_ids]),
        "horizon_minutes": np.asarray(_horizon_minutes(run.settings)),
    }
    for method in _GENERATED:
        parts = results.get(method, [])
        if not parts:
            continue
        arrays[method] = np.concatenate([part.forecast for part in parts], axis=1)
        spreads = [part.spread for part in parts if part.spread is not None]
        if len(spreads) == len(parts):
            arrays[f"{method}_std"] = np.concatenate(spreads, axis=1)
    return arrays


def _report_arrays(run: Stages) -> dict[str, np.ndarray]:
    """Where regions lie, and the first two principal components of the zoo with what was generated among them."""
    city = run.target_cities[0]
    arrays = {"senders": city.senders, "receivers": city.receivers}
    if city.latitude is not None and city.longitude is not None:
        arrays |= {"latitude": city.latitude, "longitude": city.longitude}
    if ask_first((run.folder / "generated").is_dir):
        return arrays | _projections(run)
    # A run without GPDiff among its methods has generated nothing.
    none = np.zeros((0, 2), np.float32)
    places = {f"{name}_projection": none for name in ("zoo", "generated", "pooled")}
    return arrays | places | {"zoo_city": np.zeros(0, "U1"), "projection_variance": np.zeros(2)}


def _projections(run: Stages) -> dict[str, np.ndarray]:
    codec, zoo = run.hypernetwork.codec, run.zoo
    spread, pooled = np.asarray(codec.scale), np.asarray(codec.pooled_tokens)

    def differences(params: Params) -> Float[np.ndarray, "X Y"]:
        return ((tokens_of(codec.layout, params) - pooled) / spread).reshape(-1, pooled.size)

    def project(params: Params) -> Float[np.ndarray, "X 2"]:
        cuts = range(0, len(jax.tree.leaves(params)[0]), _ROWS)
        parts = (jax.tree.map(lambda leaf, first=first: leaf[first : first + _ROWS], params) for first in cuts)
        return np.concatenate([found.project(differences(part)) for part in parts]).astype(np.float32)

    # A zoo may be larger than memory: its axes are those of some rows, and a part of it is read at a time.
    of_axes = np.isin(np.arange(zoo.num_regions), evenly(zoo.num_regions, _ROWS))
    some = [
        differences(jax.tree.map(lambda leaf, rows=rows: leaf[of_axes[rows], 0], params))
        for rows, params in zoo.vectors.parts()
        if of_axes[rows].any()
    ]
    found, places = principal_axes(np.concatenate(some)), np.zeros((zoo.num_regions, 2), np.float32)
    for rows, params in zoo.vectors.parts():
        places[rows] = project(jax.tree.map(lambda leaf: leaf[:, 0], params))
    drawn = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[2:]), run.generated.params[0])
    return {
        "zoo_projection": places,
        "zoo_city": np.asarray([name.split("/", 1)[0] for name in zoo.names]),
        "generated_projection": project(drawn),
        "pooled_projection": found.project(np.zeros((1, pooled.size))).astype(np.float32),
        "projection_variance": found.shares,
    }


def results_table(content: dict[str, Any]) -> str:
    """The methods of a run with their errors, best first, as plain text."""
    heads = ("MAE", "RMSE", "weekday", "weekend", "seconds", "training")
    lines = [f"{'method':30s} " + " ".join(f"{head:>10s}" for head in heads)]
    ranked = sorted(content["methods"].items(), key=lambda item: _worst_if_none(item[1]["mae_mean"]))
    for name, entry in ranked:
        cells = [entry[column] for column in ("mae_mean", "rmse_mean", "mae_weekday", "mae_weekend")]
        words = ["-" if cell is None else format(cell, ".4g") for cell in cells]
        spent = [entry[column] for column in ("seconds", "training_seconds")]
        words += ["-" if seconds is None else format(seconds, ".1f") for seconds in spent]
        lines.append(f"{name:30s} " + " ".join(f"{word:>10s}" for word in words))
    first, last = content["horizon_minutes"][0], content["horizon_minutes"][-1]
    ahead = f"{first} to {last}" if first < last else f"{last}"
    lines.append(
        f"errors in {content['unit']}: {content['target']}, {content['regions']} regions, {content['test_windows']} "
        f"windows, {ahead} minutes ahead; seconds to fine-tune and forecast, and of training"
    )
    if content.get("protocol") == "paper":
        lines.append(f"({PAPER_NOTE})")
    return "\n".join(lines)


def _worst_if_none(error: float | None) -> float:
    return float("inf") if error is None else error
