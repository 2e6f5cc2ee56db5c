"""In: the first lines of the README. Out: they make of two tables the next hours and a page, as they stand there."""

import csv
import os
import pathlib
import subprocess
import sys

_ROOT = pathlib.Path(__file__).parents[2]


def test_the_first_lines_of_the_readme_forecast(tmp_path):
    block = (_ROOT / "README.md").read_text().split("```bash\n")[1].split("```")[0]
    install, *lines = block.strip().splitlines()
    assert install.startswith("python -m pip install") and len(lines) == 2
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "LC_ALL": "C.UTF-8"}
    for line in lines:
        words = [word.replace("docs/example", str(_ROOT / "docs" / "example")) for word in line.split()]
        assert words[0] == "python"
        done = subprocess.run(
            [sys.executable, *words[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
        )
        assert (done.returncode, done.stderr) == (0, "")
    rows = list(csv.DictReader((tmp_path / "next.csv").read_text().splitlines()))
    assert len(rows) == 16 * 6 and rows[0]["ds"] == "2024-01-14T16:00"
    assert all(float(row["q05"]) <= float(row["q50"]) <= float(row["q95"]) for row in rows)
    assert (tmp_path / "next.html").read_text().count("<figure") == 10
