"""Compares all methods on the target's test span; writes metrics, tables, forecasts and the report.

The last stage of `python -m experiments.transfer`, with the same flags and the same folder; runs what comes before
where the folder does not hold it. With --forecasts, forecasts of other programs are judged and reported beside them.

    python -m experiments.evaluate --data_dir DIR --sources a,b --target c --out_dir runs/c --forecasts dcrnn=dcrnn.npz
"""

from absl import flags

from experiments import command_line
from experiments.run_flags import run_main
from gpdiff_jax import Run
from gpdiff_jax.errors import InputError
from gpdiff_jax.files import read_npz, user_path
from gpdiff_jax.training.exchange import ask_first

_FORECASTS = flags.DEFINE_list(
    "forecasts",
    [],
    "forecasts of other programs, NAME=FILE.npz separated by commas: `forecast` [S, R, P] in the unit of the data; "
    "and `window_start` [S], `node_ids` [R] where windows or regions are not those of the run's forecasts.npz one by "
    "one; they are kept in the run's folder",
)


def show(run: Run) -> None:
    """Writes the results and prints the table of methods."""
    words = [word.partition("=") for word in _FORECASTS.value]
    for name, equals, path in words:
        if not (equals and path):
            raise InputError(f"--forecasts names {name + equals!r}; write NAME=FILE.npz, as dcrnn=dcrnn.npz")
        if [other for other, *_ in words].count(name) > 1:
            raise InputError(f"--forecasts names {name!r} twice; give every file a name of its own")
    for name, _, path in words:
        held = ask_first(lambda path=path: read_npz(user_path(path)))
        if "forecast" not in held:
            keys = ", ".join(held) or "nothing"
            raise InputError(f"{path} holds {keys}; store the forecasts under `forecast`, windows x regions x steps")
        run.add_forecasts(name, held["forecast"], window_start=held.get("window_start"), node_ids=held.get("node_ids"))
    print(run.table())
    print(run.folder / "report.html")


if __name__ == "__main__":
    command_line.run(run_main(show))
