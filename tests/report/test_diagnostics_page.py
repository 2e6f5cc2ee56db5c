"""In: numbers of a diagnosis. Out: a page whose verdicts follow them, and one line where they cannot be read."""

import copy
import json
import re

import pytest

from gpdiff_jax.errors import InputError
from gpdiff_jax.report.diagnostics_page import render_diagnostics

_GROUP = {
    "regions": 40, "rms": 0.9, "effective_rank": 18.0, "nearest": 4.0, "correlation": 0.41, "sample_rms": 0.2,
    "harvested_rms": 1.0, "harvested_effective_rank": 20.0, "harvested_nearest": 5.0, "harvested_correlation": 0.3,
}  # fmt: skip
_PART = {
    "error": 0.4, "spread": 0.08, "pooled": 0.5, "harvested": 0.3, "shuffled": 0.44, "rise": 10.0,
    "rise_deviation": 1.0, "shuffled_across": 0.5, "rise_across": 25.0, "rise_deviation_across": 2.0,
}  # fmt: skip
_CONTENT = {
    "target": "a<b>", "unit": "km/h", "seed": 3, "covariates": "none", "samples": 5, "steps": 20, "guidance": 1.0,
    "shuffles": 5, "variants": 3, "latent_width": 100,
    "groups": {
        "training": _GROUP, "held_out": _GROUP,
        "a<b>": {name: value for name, value in _GROUP.items() if not name.startswith("harvested")} | {"rms": 2.0},
    },
    "response": {
        "held_out": _PART,
        "a<b>": {"error": 12.5, "spread": None, "pooled": 20.0, "shuffled": 12.0, "rise": -4.0, "rise_deviation": None},
    },
}  # fmt: skip


def _page(folder, content) -> str:
    (folder / "diagnostics.json").write_text(json.dumps(content))
    path = render_diagnostics(folder)
    assert path == folder / "diagnostics.html"
    return path.read_text()


def test_a_generator_that_does_well_is_told_so(tmp_path):
    page = _page(tmp_path, _CONTENT)
    for words in ("as varied as the zoo", "neither copies nor strays", "it follows its prompt", "samples differ"):
        assert words in page
    assert "<b>" not in page and page.count("<script") == 1 and "a&lt;b&gt;" in page
    assert "var(--few-shot)" not in page[page.index("<header>") : page.index("</header>")]
    row = re.search(r'<tr><th scope="row" data-value="Size, generated to harvested">.*?</tr>', page)
    assert row is not None and re.findall(r">([\d.]+)</td>", row.group()) == ["0.90", "0.90", "2.00"]
    assert ">−4.0 %</td>" in page and ">+10.0 %</td>" in page and ">0.20</td>" in page
    # Every number has its words.
    body = page[page.index("<main>") :]
    assert body.count('<td class="words"') == body.count('<th scope="row"') == 22


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rms": 0.1}, "collapses towards an average"),
        ({"rms": 1.9}, "wilder than the zoo"),
        ({"effective_rank": 2.0}, "keeps to few directions"),
        ({"nearest": 0.0}, "close to copies"),
        ({"nearest": 50.0}, "strays outside the zoo"),
        ({"rise": 0.4}, "it all but ignores which region the prompt describes"),
        ({"spread": 0.0001}, "samples forecast alike"),
    ],
)
def test_a_generator_that_fails_is_told_how(tmp_path, change, words):
    content = copy.deepcopy(_CONTENT)
    name, value = next(iter(change.items()))
    part = content["groups"]["held_out"] if name in _GROUP else content["response"]["held_out"]
    part[name] = value
    page = _page(tmp_path, content)
    assert words in page and page.count("--edge: var(--few-shot)") == 1


def test_what_is_absent_is_a_dash_and_what_is_broken_one_line(tmp_path):
    content = copy.deepcopy(_CONTENT)
    for name in ("effective_rank", "rms", "nearest"):
        content["groups"]["held_out"][name] = None
    for name in ("rise", "spread"):
        content["response"]["held_out"][name] = None
    page = _page(tmp_path, content)
    header = page[: page.index("</header>")]
    assert 'class="tile"' not in header and page.count('<td data-value="">–</td>') >= 5
    (tmp_path / "diagnostics.json").write_text("{}")
    with pytest.raises(
        InputError, match=r"diagnostics.json' is damaged \(KeyError\); `experiments.diagnose` makes it again"
    ):
        render_diagnostics(tmp_path)
    with pytest.raises(InputError, match=r"has no diagnostics\.json; run `experiments\.diagnose` first"):
        render_diagnostics(tmp_path / "nowhere")
