"""Times a city's next hours: from the start of a process, and as readings come; and the memory that it takes.

    python -m benchmarks.forecast [--regions 1000,5000] [--adapt]

A city of so many regions is made of a simulated one, many times side by side, and written as a city file. One process
runs `experiments.forecast` on it, which generates the parameters; another saves parameters; a third loads them, makes a
`gpdiff_jax.Forecaster`, and forecasts after every update. Every process runs twice, the second time at least with
programs that are in the compilation cache. Prints JSON lines.
"""

import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from absl import flags

from experiments import command_line

flags.DEFINE_list("regions", ["1000", "5000"], "numbers of regions")
flags.DEFINE_integer("days", 14, "days that were read", 1)
flags.DEFINE_integer("samples", None, "parameter sets per region; default as many as experiments.forecast takes", 1)
flags.DEFINE_integer("updates", 30, "updates that are timed", 1)
flags.DEFINE_bool("adapt", False, "fine-tune on the days that were read")
flags.DEFINE_string("part", None, "what this process does in a folder; made by the benchmark itself")
flags.DEFINE_string("folder", None, "the folder; made by the benchmark itself")


def make_city(regions: int, days: int, path: pathlib.Path) -> None:
    """Writes a city of so many regions: a simulated one of a hundred, many times side by side."""
    import numpy as np

    import gpdiff_jax as gpd

    size = min(regions, 100)
    one = gpd.simulate_cities(gpd.SimulationConfig(cities=1, regions=size, days=days + 3), seed=0)[0]
    times = -(-regions // size)
    shift = np.repeat(np.arange(times) * size, len(one.senders)).astype(np.int32)
    links = np.tile(one.senders, times) + shift, np.tile(one.receivers, times) + shift
    kept = (links[0] < regions) & (links[1] < regions)
    none = {"latitude": None, "longitude": None, "poi": None, "poi_names": ()}
    city = dataclasses.replace(
        one,
        name="large",
        values=np.tile(one.values, (1, times, 1))[: 24 * days, :regions],
        senders=links[0][kept],
        receivers=links[1][kept],
        weights=np.tile(one.weights, times)[kept],
        node_ids=tuple(f"r{number}" for number in range(regions)),
        **none,
    )
    gpd.save_city(path, city)


def save(folder: pathlib.Path) -> None:
    """Generates and saves parameters."""
    import jax

    import gpdiff_jax as gpd
    from gpdiff_jax.run.new_city import samples_that_fit

    gpd.use_every_core()
    gpd.enable_compilation_cache()
    generator = gpd.load_pretrained()
    new_city = gpd.prepare_new_city(gpd.load_city(folder / "large.npz"), generator)
    samples = flags.FLAGS.samples or samples_that_fit(generator, new_city.city.num_nodes)
    config = gpd.GenerateConfig(samples=samples)
    parameters = generator.generate(new_city.prompts, key=jax.random.key(0), config=config)
    gpd.save_parameters(folder / "parameters", parameters, new_city)
    print(json.dumps({"samples": samples}))


def serve(folder: pathlib.Path) -> None:
    """Loads parameters and a city, and forecasts after every update."""
    import numpy as np

    import gpdiff_jax as gpd
    from benchmarks.measuring import peak_memory

    gpd.use_every_core()
    gpd.enable_compilation_cache()
    city = gpd.load_city(folder / "large.npz")
    adapt = gpd.AdaptConfig() if flags.FLAGS.adapt else None
    forecaster = gpd.Forecaster(gpd.load_parameters(folder / "parameters").parameters, city, adapt=adapt)
    forecaster.forecast()
    print(json.dumps({"first": time.time()}), flush=True)
    seconds = []
    for number in range(flags.FLAGS.updates):
        row = np.asarray(city.values[number % city.num_steps, :, 0])[None]
        begin = time.perf_counter()
        forecaster.update([forecaster.end], row)
        forecaster.forecast()
        seconds.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    forecaster.refresh()
    refreshed = time.perf_counter() - begin
    print(json.dumps({"update": statistics.median(seconds), "refresh": refreshed, "memory": peak_memory()}))


def _measure(part: str, folder: pathlib.Path) -> tuple[float, list[dict]]:
    """Runs a process to its end; its seconds from start to end, and the JSON lines that it printed."""
    own = [f"--{name}={flags.FLAGS[name].value}" for name in ("samples", "updates") if flags.FLAGS[name].value]
    command = [sys.executable, "-m", "benchmarks.forecast", f"--part={part}", f"--folder={folder}", *own]
    if flags.FLAGS.adapt:
        command.append("--adapt")
    begin = time.time()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if lines and "first" in lines[0]:
        lines[0]["first"] -= begin
    return time.time() - begin, lines


def _command(folder: pathlib.Path) -> tuple[float, float]:
    """Seconds and GiB of `experiments.forecast`."""
    words = [f"--city={folder / 'large.npz'}", f"--out_file={folder / 'next.csv'}"]
    if flags.FLAGS.samples:
        words.append(f"--samples={flags.FLAGS.samples}")
    if flags.FLAGS.adapt:
        words.append("--adapt")
    probe = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20)"
    )
    begin = time.time()
    command = [sys.executable, "-c", probe, sys.executable, "-m", "experiments.forecast", *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return time.time() - begin, float(done.stdout)


def main(argv: list[str]) -> None:
    """Measures every number of regions, or does a part of it."""
    del argv
    given = flags.FLAGS
    if given.part is not None:
        {"save": save, "serve": serve}[given.part](pathlib.Path(given.folder))
        return
    from benchmarks.measuring import print_line
    from gpdiff_jax import use_every_core

    use_every_core()  # as what is measured does: the lines name the cores
    for regions in map(int, given.regions):
        case = f"{regions} regions, {given.days} days" + (", adapted" if given.adapt else "")
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            make_city(regions, given.days, folder / "large.npz")
            for state in ("first run", "warm cache"):
                seconds, memory = _command(folder)
                print_line("forecast", f"{case}, experiments.forecast, {state}", "time", seconds, "s")
                print_line("forecast", f"{case}, experiments.forecast, {state}", "peak_memory", memory, "GiB")
            samples = _measure("save", folder)[1][0]["samples"]
            for state in ("first run", "warm cache"):
                _, (first, rest) = _measure("serve", folder)
                own = f"{case}, {samples} samples, Forecaster, {state}"
                print_line("forecast", f"{own}, process start to first forecast", "time", first["first"], "s")
                print_line("forecast", f"{own}, update and forecast", "time", rest["update"], "s")
                print_line("forecast", f"{own}, refresh", "time", rest["refresh"], "s")
                print_line("forecast", own, "peak_memory", rest["memory"], "GiB")


if __name__ == "__main__":
    command_line.run(main)
