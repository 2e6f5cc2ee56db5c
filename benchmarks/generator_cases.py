"""In: results of the generators that `benchmarks.generators` compares. Out: which these are, and their table."""

import json
import pathlib
from typing import NamedTuple

import numpy as np

from gpdiff_jax.diffusion.conditioning import STRATEGIES

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


def table(results: pathlib.Path) -> str:
    """What the folder of results holds, as Markdown: means over seeds."""
    heads = ["", *(name.replace("_", " ") for name in SHOWN), "steps a second", "denoiser", "GiB", "seeds"]
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for name in CASES:
        paths = sorted(results.glob(f"{name}_[0-9]*.json"))
        found = [json.loads(path.read_text()) for path in paths]
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
