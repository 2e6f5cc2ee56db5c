"""Means and standard deviations over runs, as a table.

Give it the output folders of `python -m experiments.transfer`, usually one per seed. Runs that differ in more than the
seed land in tables of their own. With --against METHOD it compares a method with every other region by region, with
--ranks it gives the mean rank of every method over runs of any targets.
"""

from absl import flags

from experiments import command_line
from gpdiff_jax.analysis import paired, summary

_FORMAT = flags.DEFINE_enum("format", "text", list(summary.FORMATS), "How to print the tables.")
_METRIC = flags.DEFINE_list(
    "metric",
    ["mae_mean", "rmse_mean", "mae_weekday", "mae_weekend"],
    f"The columns, separated by commas, among {', '.join(summary.METRICS)}.",
)

_AGAINST = flags.DEFINE_string(
    "against", None, "A method to compare with every other, region by region, in all runs, which must be of one target."
)
_RANKS = flags.DEFINE_bool("ranks", False, "Print the mean rank of every method over all runs, of any targets.")

flags.register_validator(
    "metric",
    lambda names: bool(names) and all(name in summary.METRICS for name in names),
    message=f"--metric takes names among {', '.join(summary.METRICS)}",
)


def main(argv: list[str]) -> None:
    """Prints the tables of the runs named on the command line, or what they say of ranks and of one method."""
    runs, against = argv[1:], _AGAINST.value
    if not _RANKS.value and against is None:
        print(summary.format_groups(summary.summarize_runs(runs), style=_FORMAT.value, metrics=_METRIC.value))
    if _RANKS.value:
        ranks = paired.average_ranks(runs)
        print(f"mean rank over {len(runs)} runs, of {len(ranks)} methods:")
        print("\n".join(f"  {rank:5.2f}  {name}" for name, rank in ranks.items()))
    if against is not None:
        print(paired.paired_table(paired.paired_differences(runs, against), against))


if __name__ == "__main__":
    command_line.run(main, positional="RUN_DIR ...")
