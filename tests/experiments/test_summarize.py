"""In: run folders on disk and the words of a user.
Out: what the command prints, and its exit code.
"""

import json
import os
import pathlib
import subprocess
import sys

from experiments import summarize
from tests.commands import run_here

_ROOT = pathlib.Path(__file__).resolve().parents[2]


def _summarize(*words):
    """In this process."""
    return run_here(summarize.main, *map(str, words), cwd=pathlib.Path.cwd(), positional="RUN_DIR ...")


def _summarize_in_a_shell(*words):
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", "experiments.summarize", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )


def _write_run(folder, seed, mae):
    folder.mkdir()
    methods = {"gpdiff_few_shot": {"mae_mean": mae, "rmse_mean": 2 * mae}}
    (folder / "metrics.json").write_text(json.dumps({"target": "springfield", "seed": seed, "methods": methods}))
    return folder


def test_command_prints_the_chosen_metric(tmp_path):
    runs = [_write_run(tmp_path / str(seed), seed, mae) for seed, mae in enumerate([1.0, 2.0, 3.0])]
    result = _summarize_in_a_shell(*runs, "--format", "json", "--metric=rmse_mean")
    assert (result.returncode, result.stderr) == (0, "")
    (group,) = json.loads(result.stdout)
    assert group["methods"] == {"gpdiff_few_shot": {"rmse_mean": {"mean": 4.0, "std": 2.0, "runs": 3}}}


def test_unreadable_folder_is_one_line_and_exit_code_2(tmp_path):
    result = _summarize(tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: run folder ") and result.stderr.count("\n") == 1


def test_unknown_metric_is_one_line_and_exit_code_2(tmp_path):
    result = _summarize(tmp_path, "--metric=mea")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "--metric takes names among mae_mean, rmse_mean" in result.stderr
