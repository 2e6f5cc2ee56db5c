"""Means and standard deviations over runs, as a table.

Give it the output folders of `python -m experiments.transfer`, usually one per seed. Runs that differ in more than the
seed land in tables of their own.
"""

from absl import flags

from experiments import command_line
from gpdiff_jax.analysis import summary

_FORMAT = flags.DEFINE_enum("format", "text", list(summary.FORMATS), "How to print the tables.")
_METRIC = flags.DEFINE_list(
    "metric",
    ["mae_mean", "rmse_mean", "mae_weekday", "mae_weekend"],
    f"The columns, separated by commas, among {', '.join(summary.METRICS)}.",
)

flags.register_validator(
    "metric",
    lambda names: bool(names) and all(name in summary.METRICS for name in names),
    message=f"--metric takes names among {', '.join(summary.METRICS)}",
)


def main(argv: list[str]) -> None:
    """Prints the tables of the runs named on the command line."""
    print(summary.format_groups(summary.summarize_runs(argv[1:]), style=_FORMAT.value, metrics=_METRIC.value))


if __name__ == "__main__":
    command_line.run(main, positional="RUN_DIR ...")
