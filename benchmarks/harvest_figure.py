"""Draws time and memory of a harvest against the number of regions, from what `benchmarks.harvest` printed.

python -m benchmarks.harvest_figure benchmarks/results/harvest_amd_epyc_2_cores.jsonl docs/harvest.svg
"""

import json
import pathlib

import numpy as np
from matplotlib.figure import Figure

from experiments import command_line
from gpdiff_jax.errors import InputError


def main(argv: list[str]) -> None:
    """Reads the lines of the first file and draws into the second."""
    if len(argv) != 3:
        raise InputError(f"got {len(argv) - 1} files; name two, that of JSON lines and the figure")
    lines = [json.loads(line) for line in pathlib.Path(argv[1]).read_text().splitlines()]
    values: dict[tuple[str, str, int], float] = {}
    for line in lines:
        if "peer" in line:
            continue
        model, _, regions = line["case"].rpartition("_")
        key = line["metric"], model, int(regions)
        values[key] = line["value"]  # of a case that was measured again, the last
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    for model in dict.fromkeys(model for _, model, _ in values):
        regions = np.array(sorted(count for metric, name, count in values if (metric, name) == ("time", model)))
        seconds = np.array([values["time", model, count] for count in regions]) * regions / 1e3
        (drawn,) = time_axes.loglog(regions, seconds, marker="o", label=model)
        linear = np.array([regions[0], regions[-1]])
        time_axes.loglog(linear, linear * seconds[-1] / regions[-1], linestyle=":", color=drawn.get_color())
        memory = [values["peak_memory", model, count] for count in regions]
        memory_axes.semilogx(regions, memory, marker="o", label=model)
    time_axes.set(xlabel="regions", ylabel="seconds", title="One training step of all regions (dotted: linear)")
    memory_axes.set(xlabel="regions", ylabel="GiB", title="Peak memory of the process", ylim=(0, None))
    time_axes.legend()
    figure.savefig(argv[2], metadata={"Date": None} if argv[2].endswith(".svg") else None)


if __name__ == "__main__":
    command_line.run(main, positional="LINES FIGURE")
