"""How runs look side by side: their validation curves, and a page with the table."""

import base64
import html
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

import utils

# of Okabe and Ito, the yellow a little darker; then the same with other lines
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")
LINES = ("-", "--", ":")
MOST = len(COLORS) * len(LINES)  # rows that can be told apart


def draw_curves(rows: list, labels: list[str], path: Path) -> Figure:
    """Validation accuracy and loss by epoch, a line for each row of training/side_by_side.py: the mean of its runs as
    far as all have come, and a band from the lowest to the highest."""
    drawn = [(row, label) for row, label in zip(rows, labels, strict=True) if any(row.runs[0].curves.values())]
    note = f"the first {MOST} of {len(drawn)} rows" if len(drawn) > MOST else ""
    if any(len(row.runs) > 1 for row in rows):
        note += ("; " if note else "") + "lines are means over seeds, bands reach from the lowest to the highest"
    drawn = drawn[:MOST]
    columns = max(1, int(870 // (76 + 6.8 * max((len(label) for _, label in drawn), default=1))))
    height = 20 * -(-len(drawn) // columns)
    figure = utils.new_figure(900, 404 + height, "Validation by epoch" if drawn else "No run was validated", note)
    for left, name, factor, title in ((50, "accuracy", 100, "accuracy, %"), (506, "loss", 1, "loss")):
        axes = utils.add_axes(figure, left, 82, 376, 252)
        for i, (row, _) in enumerate(drawn):
            length = min(len(run.curves[name]) for run in row.runs)
            values = factor * np.array([run.curves[name][:length] for run in row.runs], dtype=float)  # None: nan
            epochs, marker = range(1, length + 1), "o" if length <= 10 else ""
            axes.plot(epochs, values.mean(axis=0), marker=marker, markersize=2.5, lw=1.4, **style(i))
            if len(row.runs) > 1:
                band = values.min(axis=0), values.max(axis=0)
                axes.fill_between(epochs, *band, color=style(i)["color"], alpha=0.18, linewidth=0)
        axes.set_title(title, size=11)
        axes.set_xlabel("epoch", labelpad=2)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.grid()
    handles = [Line2D([], [], lw=1.8, label=label, **style(i)) for i, (_, label) in enumerate(drawn)]
    place = {"loc": "upper left", "bbox_to_anchor": (0.045, 1 - 384 / (404 + height)), "borderaxespad": 0}
    figure.legend(handles=handles, ncols=columns, handlelength=2.6, **place)
    utils.save_figure(figure, path)
    return figure


def style(i: int) -> dict:
    return {"color": COLORS[i % len(COLORS)], "ls": LINES[i // len(COLORS)]}


# ------------------------------------------------------------------------------------------------------------- page

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Runs side by side</title>
<style>
:root {{ color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }}
body {{ margin: 2rem; }}
div {{ overflow-x: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .3rem .7rem; text-align: left; border-bottom: 1px solid #8886; white-space: nowrap; }}
.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
button {{ all: unset; cursor: pointer; font-weight: bold; }}
button:focus-visible {{ outline: 2px solid; outline-offset: 3px; }}
[aria-sort=ascending] button::after {{ content: " \\2191" / ""; }}
[aria-sort=descending] button::after {{ content: " \\2193" / ""; }}
tbody th {{ font-weight: normal; }}
img {{ max-width: 100%; border-radius: 6px; }}
</style>
</head>
<body>
<h1>Runs side by side</h1>
<div tabindex="0" role="region" aria-label="Table of runs"><table>
<thead><tr>{headings}</tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
<p>A heading sorts. {notes}</p>
<img alt="Validation accuracy and loss of each run by epoch" src="data:image/png;base64,{picture}" width="900">
<script>
const headings = [...document.querySelectorAll("thead th")], body = document.querySelector("tbody");
headings.forEach((heading, column) => heading.firstElementChild.addEventListener("click", () => {{
  const before = heading.getAttribute("aria-sort"), first = heading.dataset.first;
  const now = before !== first ? first : first === "ascending" ? "descending" : "ascending";
  headings.forEach(other => other.removeAttribute("aria-sort"));
  heading.setAttribute("aria-sort", now);
  const value = row => row.cells[column].dataset.value, sign = now === "ascending" ? 1 : -1;
  const rows = [...body.rows], texts = rows.some(row => isNaN(value(row)));
  rows.sort((a, b) => {{
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === "");  // what is not known comes last
    return sign * (texts ? x.localeCompare(y, undefined, {{numeric: true}}) : x - y);
  }});
  body.append(...rows);
}}));
</script>
</body>
</html>
"""


def html_page(
    texts: list[dict[str, str]], keys: list[dict], sort: str, descending: tuple[str, ...], notes: list[str], png: bytes
) -> str:
    """One page with nothing loaded from elsewhere: the table, sorted by the column whose heading is pressed, and the
    curves.

    Args:
        texts, keys: of each row, by column, what is shown and what it is sorted by.
        sort: the column by which the rows are sorted.
        descending: columns of which the highest is the best.
    """
    numbers = {name for name in texts[0] if all(isinstance(row[name], int | float | None) for row in keys)}
    headings = []
    for name in texts[0]:
        first = "descending" if name in descending else "ascending"
        marks = ' class="number"' * (name in numbers) + f' aria-sort="{first}"' * (name == sort)
        button = f'<button type="button">{html.escape(name)}</button>'
        headings.append(f'<th scope="col" data-first="{first}"{marks}>{button}</th>')
    rows = []
    for text, key in zip(texts, keys, strict=True):
        cells = []
        for name, shown in text.items():
            tag, scope = ("th", ' scope="row"') if name == "name" else ("td", "")
            value = "" if key[name] is None else html.escape(str(key[name]))
            mark = ' class="number"' * (name in numbers)
            cells.append(f'<{tag}{scope}{mark} data-value="{value}">{html.escape(shown)}</{tag}>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return PAGE.format(
        headings="".join(headings),
        rows="\n".join(rows),
        notes=html.escape(" ".join(notes)),
        picture=base64.b64encode(png).decode(),
    )
