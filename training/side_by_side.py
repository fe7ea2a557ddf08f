"""Your own runs side by side: in what they differ, how far each came, and what it does on its validation images."""

import csv
import io
import os
import re
import shutil
import statistics
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import cli
from support.files import write_bytes
from support.report import plain_table, shorten, shorten_names
from training.side_by_side_figures import draw_curves, html_page
from training.stored_runs import MEASURED, StoredRun, read_runs

OWN_COLUMNS = {"model", "epochs"}  # of the config, shown even where all runs have the same
VALIDATION_IMAGES = ("dataset", "classes", "val_fraction", "split_seed", "fold")  # what decides which they are
ACCURACIES = ("val_accuracy", "best_val_accuracy", "test_accuracy")  # the higher the better; all else is sorted upwards
LONGEST = 16  # characters of a hyperparameter's value in the terminal


@dataclass
class Row:
    """One run, or several that differ in nothing but the seed."""

    name: str
    runs: list[StoredRun]
    values: dict[str, Any]  # by column: a text, a number, or (mean, standard deviation)
    again: list[str]  # names of further runs with the same seeds

    @property
    def data(self) -> str:
        """The data set, or the classes of it: what accuracies have to share to be compared."""
        config = self.runs[0].config
        return ", ".join(filter(None, [config.get("dataset"), config.get("classes")]))

    @property
    def finished(self) -> bool:
        return self.runs[0].finished


def show(paths: tuple[str, ...], defaults: dict, sort: str, each: bool, folder: Path) -> list[Row]:
    """Print the runs as a table, and write runs.csv, runs.html and runs.png into `folder`.

    Args:
        paths: reports, checkpoints, folders of them, or patterns such as saved/*.json.
        defaults: train.py's hyperparameters, for reports of earlier versions that lack some.
        sort: the column by which rows are sorted, the best first.
        each: a row for every run; otherwise runs that differ in the seed alone share one.

    Raises:
        ValueError: there is no run, or no such column.
    """
    runs = read_runs(paths, defaults)
    differing = differences(runs, each)
    sort = sort.replace("-", "_")
    rows = sorted(sort_rows(group(runs, differing, each), sort), key=lambda row: row.data)
    columns = [name for name in rows[0].values if any(row.values[name] is not None for row in rows)]
    if all(len(row.runs) == 1 for row in rows) and sort != "runs":
        columns.remove("runs")
    notes = describe(runs, rows)
    texts = [{name: as_text(row, name) for name in columns} for row in rows]
    several = len({row.data for row in rows}) > 1
    for data in dict.fromkeys(row.data for row in rows):
        mine = [text for row, text in zip(rows, texts, strict=True) if row.data == data]
        if several:  # a table for each, in which they are ranked
            print(f"{data}:")
            mine = [{name: text[name] for name in columns if name not in ("dataset", "classes")} for text in mine]
        print(as_table(mine, importance(mine, differing, sort)), end="\n\n")
    for note in notes:
        print(textwrap.fill(note, shutil.get_terminal_size().columns))
    files = [folder / f"runs.{ending}" for ending in ("csv", "html", "png")]
    write_bytes(files[0], as_csv(rows).encode())
    draw_curves(rows, [label(row, differing, rows) for row in rows], files[2])
    keys = [{name: plain(row.values[name]) for name in columns} for row in rows]
    sorted_by = "" if several else sort
    write_bytes(files[1], html_page(texts, keys, sorted_by, ACCURACIES, notes, files[2].read_bytes()).encode())
    cli.say_written(files)
    return rows


def differences(runs: list[StoredRun], each: bool) -> list[str]:
    """The hyperparameters that are not the same in all runs that know them; the seed where each has a row."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    found = {name: {run.config[name] for run in runs if name in run.config} for name in names}
    own = OWN_COLUMNS if each else {*OWN_COLUMNS, "seed"}
    return [name for name, values in found.items() if len(values) > 1 and name not in own]


def group(runs: list[StoredRun], differing: list[str], each: bool) -> list[Row]:
    """A row for the runs that differ in the seed alone. A seed counts once: to train it again tells nothing new. What
    has not finished has a row of its own."""
    groups, again = {}, {}
    for run in runs:
        key = tuple(run.config.get(name) for name in ("model", "epochs", *differing))
        if each or not run.finished:
            key = (run.name,)
        members = groups.setdefault(key, [])
        if run.config["seed"] in {other.config["seed"] for other in members}:
            again.setdefault(key, []).append(run.name)
        else:
            members.append(run)
    common = [common_name([run.name for run in members]) for members in groups.values()]
    rows = []
    for name, (key, members) in zip(common, groups.items(), strict=True):
        name = name if common.count(name) == 1 else first_and_more([run.name for run in members])
        rows.append(Row(name, members, values(name, members, differing), again.get(key, [])))
    return rows


def common_name(names: list[str]) -> str:
    """ablation_adamw of ablation_adamw_seed0 and ablation_adamw_seed1; where names do not begin alike, as below."""
    begin = re.match(r"(.*)[_\-. ]", os.path.commonprefix(names)) if len(names) > 1 else None
    return begin[1] if begin else first_and_more(names)


def first_and_more(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def values(name: str, runs: list[StoredRun], differing: list[str]) -> dict[str, Any]:
    """A row's values by column."""
    config = runs[0].config
    row = {"name": name, "runs": len(runs), "model": config.get("model")}
    row |= {what: config.get(what) for what in differing}
    for what in MEASURED:
        known = [run.measured[what] for run in runs]
        row[what] = None
        if None not in known:  # else the mean would be of fewer runs than the row says
            row[what] = (statistics.fmean(known), statistics.stdev(known)) if len(known) > 1 else (known[0], None)
    return row


def plain(value: Any) -> Any:
    """What a value is sorted by: the mean of several."""
    return value[0] if isinstance(value, tuple) else value


def sort_rows(rows: list[Row], column: str) -> list[Row]:
    """The best first, and those without a value last."""
    if column not in rows[0].values:
        raise ValueError(f"--sort {column}: there is no such column, but {', '.join(rows[0].values)}")

    def order(row: Row) -> tuple:
        value = plain(row.values[column])
        return isinstance(value, str), value

    known = [row for row in rows if row.values[column] is not None]
    unknown = [row for row in rows if row.values[column] is None]
    return sorted(known, key=order, reverse=column in ACCURACIES) + unknown


def describe(runs: list[StoredRun], rows: list[Row]) -> list[str]:
    """Notes below the table: what its marks mean, and whether the accuracies can be compared."""
    notes = []
    if any(len(row.runs) > 1 for row in rows):
        notes.append("Mean ± standard deviation of runs that differ in the seed alone.")
    if again := [name for row in rows for name in row.again]:
        more = f" and {len(again) - 4} more" if len(again) > 4 else ""
        notes.append(f"Left out, as the same run with the same seed is there already: {', '.join(again[:4])}{more}.")
    if not all(row.finished for row in rows):
        notes.append("* not finished: interrupted, or still running; its last epoch until now.")
    names = [name for name in VALIDATION_IMAGES if len({run.config.get(name) for run in runs}) > 1]
    images = {}
    for run in runs:
        if run.images is not None:
            same = tuple(run.config.get(name) for name in ("dataset", "classes", "label_fraction"))
            images.setdefault(same, set()).add(run.images)
    if any(len(marks) > 1 for marks in images.values()):
        names.append("pictures in the folder")
    if names:
        listed = ", ".join(name.replace("_", " ") for name in names)
        notes.append(f"Not all of these accuracies can be compared: the images are others ({listed}).")
    return notes


def label(row: Row, differing: list[str], rows: list[Row]) -> str:
    """A row's name for the legend, with what differs where that is short."""
    shown = ["model"] * (len({other.values["model"] for other in rows}) > 1) + differing
    what = ", ".join(f"{name} {as_text(row, name) or 'none'}" for name in shown)
    text = shorten(row.name, 40) + (f": {what}" if 0 < len(what) <= 40 else "")
    return text + (f" (n = {len(row.runs)})" if len(row.runs) > 1 else "") + " *" * (not row.finished)


# ------------------------------------------------------------------------------------------------------------ texts


def as_text(row: Row, column: str) -> str:
    """What the table shows."""
    value = row.values[column]
    mean, deviation = value if isinstance(value, tuple) else (value, None)
    if mean is None:
        return ""
    if column in ACCURACIES:
        return f"{mean:.1%}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")
    if column.endswith("loss") and column in MEASURED:
        return f"{mean:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")
    if column == "epochs":
        return f"{mean:.4g}" + ("" if row.finished else f" of {row.runs[0].config.get('epochs', '?')} *")
    if column in MEASURED:
        return f"{mean:,.1f}" if column == "minutes" else f"{mean:,.0f}"
    return f"{mean:g}" if isinstance(mean, float) else str(mean)


def importance(texts: list[dict[str, str]], differing: list[str], sort: str) -> list[str]:
    """The columns, what can least be done without first; without those that are the same in all of several rows."""
    first = ["name", sort, "val_accuracy", "test_accuracy"]
    order = [*first, "model", *differing[:3], "epochs", "runs", *differing[3:], "minutes", "val_loss", "parameters"]
    order += ["best_val_accuracy", "best_val_loss"]
    vary = {name for name in texts[0] if name in first or len(texts) == 1 or len({row[name] for row in texts}) > 1}
    return [name for name in dict.fromkeys(order) if name in vary]


def as_table(texts: list[dict[str, str]], importance: list[str]) -> str:
    """Aligned columns as wide as the terminal, in a second table where they do not fit into one; then what is the same
    in all rows, and which columns are left out."""
    width, left = shutil.get_terminal_size().columns, importance
    cells, parts = {}, []
    for name in importance:
        limit = width if name in MEASURED else max(16, width // 3) if name == "name" else LONGEST
        cells[name] = shorten_names([row[name] for row in texts], limit)
    while left and len(parts) < 2:
        shown, used = [], -2
        for name in dict.fromkeys(["name", *left]):
            needed = max(map(len, [name, *cells[name]])) + 2
            if used + needed <= width or not shown:
                used += needed
                shown.append(name)
        columns = {name: cells[name] for name in texts[0] if name in shown}
        parts.append(plain_table(columns, left=columns.keys() - {"runs", *MEASURED}))
        left = [name for name in left if name not in shown]
    same = [f"{name} {value or 'none'}" for name, value in texts[0].items() if name not in importance]
    notes = [f"The same in all rows: {', '.join(same)}."] * bool(same)
    notes += [f"No room here, but in the files: {', '.join(left)}."] * bool(left)
    return "\n\n".join([*parts, *(textwrap.fill(note, width) for note in notes)])


def as_csv(rows: list[Row]) -> str:
    """All columns, accuracies as fractions; of several runs mean and standard deviation."""
    lines = []
    for row in rows:
        line = {"finished": row.finished, "epochs_asked_for": row.runs[0].config.get("epochs")}
        for name, value in row.values.items():
            if name in MEASURED:
                line[name], line[f"{name}_std"] = value if value is not None else (None, None)
            else:
                line[name] = value
        lines.append(line)
    buffer = io.StringIO()
    columns = [*rows[0].values, *(name for name in lines[0] if name not in rows[0].values)]
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()
