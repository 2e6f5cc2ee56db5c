"""Does it generate? Measures what the generator draws; writes diagnostics.json and diagnostics.html.

Collapse, memorisation, deafness to the prompt and agreement of samples, on the regions it was trained on, those held
out and the target's support days. With --room instead, every source city is left out in turn and a generator trained
on the others: how much better the city's own parameters are than the pooled model of the others, and what share of that
room the generator reaches, by prompts and fine-tuned; room.json, and room/CITY.json as they come. The same flags and
the same folder as `python -m experiments.transfer`; runs what comes before where the folder does not hold it.

    python -m experiments.diagnose --data_dir DIR --sources a,b --target c --out_dir runs/c
"""

from absl import flags

from experiments import command_line
from experiments.run_flags import run_main
from gpdiff_jax import DiagnosticsConfig, Run
from gpdiff_jax.run.room import room_table

flags.DEFINE_integer("shuffles", 5, "how often prompts are shuffled", 1, 1000)
flags.DEFINE_bool("room", False, "train a generator without each source city in turn, and measure the room there")


def show(run: Run) -> None:
    """Measures, writes, and prints what a reader should see first."""
    if flags.FLAGS.room:
        print(room_table(run.measure_rooms()))
        print(run.folder / "room.json")
        return
    content = run.diagnose(DiagnosticsConfig(generate=run.settings.generate, shuffles=flags.FLAGS.shuffles))
    held_out, groups = content["response"]["held_out"], content["groups"]
    print(f"size of generated to harvested: {groups['held_out']['rms'] / groups['held_out']['harvested_rms']:.2f}")
    for name, part in content["response"].items():
        unit = "deviations of a region" if name == "held_out" else content["unit"]
        where = name if name == "held_out" else f"{name}, on its support days"
        print(f"{where}: error {_text(part['error'])} {unit}, with shuffled prompts {_text(part['rise'])} % more")
    held = [f"{name} {_text(held_out[name])}" for name in ("pooled", "harvested")]
    print(f"held_out: {', '.join(held)} deviations of a region")
    print(run.folder / "diagnostics.html")


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    command_line.run(run_main(show, on_hosts=False))
