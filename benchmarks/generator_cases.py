"""In: results of the generators that `benchmarks.generators` compares. Out: which these are, and their table."""

import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from gpdiff_jax.diffusion.conditioning import STRATEGIES
from gpdiff_jax.errors import InputError

# Of results that may stand in one table; 2: fine-tuned with the preset's shared steps, memory of the training alone.
FORMAT = 2
SHOWN = ("pooled", "generated", "generated_shuffled", "generated_adapted", "generated_posterior", "own")


class Case(NamedTuple):
    """A generator: of which model, where the prompt enters, and what the network predicts along which schedule."""

    model: str = "stid"
    conditioning: str = "adaptive_norm"
    objective: str = "v"
    schedule: str = "cosine"


CASES = {
    **{name: Case(conditioning=name) for name in STRATEGIES},
    "x0": Case(objective="x0"),
    "flow": Case(objective="flow", schedule="rectified_flow"),
    **{name: Case(model=name) for name in ("stgcn", "graph_wavenet", "dcrnn")},
}


def read_result(path: pathlib.Path, city: str) -> dict[str, Any] | None:
    """A result in that city that was measured as others are today; None where there is none.

    Raises:
      InputError: it is of another city.
    """
    found = json.loads(path.read_text()) if path.exists() else {}
    if found.get("format") != FORMAT:
        return None
    if found["city"] != city:
        raise InputError(f"{str(path)!r} was measured in {found['city']}, not in {city}; name other --results")
    return found


def table(results: pathlib.Path, city: str) -> str:
    """What the folder of results holds of a city, as Markdown: means over seeds; see `read_result` for errors."""
    heads = ["", *(name.replace("_", " ") for name in SHOWN), "steps a second", "denoiser", "GiB", "seeds"]
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for name in CASES:
        read = [read_result(path, city) for path in sorted(results.glob(f"{name}_[0-9]*.json"))]
        found = [one for one in read if one is not None]
        if not found:
            continue
        cells = []
        for method in SHOWN:
            error = np.mean([one["error"][method] for one in found])
            shares = [one["share"][method] for one in found if one["share"].get(method) is not None]
            cells.append(f"{error:.2f}" + (f" ({100 * np.mean(shares):+.0f} %)" if shares else ""))
        rest = [np.mean([one[key] for one in found]) for key in ("steps_per_second", "denoiser_parameters")]
        memory = max(one["peak_memory"] for one in found)
        rows.append([name, *cells, f"{rest[0]:.1f}", f"{rest[1] / 1e3:,.0f} k", f"{memory:.1f}", str(len(found))])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
