"""In: a title and the parts of a page.
Out: one self-contained HTML file with the style and the script that all pages share, whole or not at all.
"""

import importlib.resources
import pathlib
from collections.abc import Iterable

from gpdiff_jax.files import write_atomically
from gpdiff_jax.report.markup import escape

_SCRIPT = """
document.querySelectorAll("table.sortable thead th").forEach(function (head, column) {
  var button = document.createElement("button");
  button.type = "button";
  while (head.firstChild) button.appendChild(head.firstChild);
  head.appendChild(button);
  button.addEventListener("click", function () {
    var table = head.closest("table"), body = table.tBodies[0], index = head.cellIndex;
    var down = head.getAttribute("aria-sort") === "ascending";
    table.querySelectorAll("thead th").forEach(function (other) { other.removeAttribute("aria-sort"); });
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    Array.from(body.rows).sort(function (a, b) {
      var x = a.cells[index].dataset.value, y = b.cells[index].dataset.value;
      if (x === "" || y === "") return (x === "") - (y === "");
      var order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return down ? -order : order;
    }).forEach(function (row) { body.appendChild(row); });
  });
});
"""


def write_page(path: pathlib.Path, title: str, parts: Iterable[str]) -> pathlib.Path:
    """Writes a page.

    Args:
      path: the file.
      title: plain text.
      parts: finished HTML, in order.

    Returns:
      The path. The page appears whole or not at all, and is the same for the same parts.
    """
    write_atomically(path, _document(title, parts).encode())
    return path


def _document(title: str, parts: Iterable[str]) -> str:
    css = importlib.resources.files("gpdiff_jax.report").joinpath("report.css").read_text(encoding="utf-8")
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{css}</style>",
            "</head>",
            "<body>",
            "<main>",
            *parts,
            "</main>",
            f"<script>{_SCRIPT}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )
