"""README and docs from stored results: every number that was measured comes from the JSON of the run that measured it.

    python -m studies.report            # writes README.md and docs/*.md from docs/templates/
    python -m studies.report --check    # fails where a page differs from that, or a number was typed
    python -m studies.report --stale    # the reports that today's code would not make, and what makes them anew

A page is edited in docs/templates/; those without a template have no measured numbers. What a template can name is in
studies/facts.py and the other studies/*_facts.py, how it is written in FILTERS below.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jinja2 import meta, nodes

from studies import ablation, facts, speed_facts, stale, study_facts, tune_facts
from studies.prose import CLOSE, OPEN, find_numbers, without_marks
from support import cli
from support.files import CheckpointError, home, write_bytes
from support.report import read_json, same_results
from support.significance import interval_text, points

TOPICS: dict[str, Callable[[Path], dict]] = {
    topic.__name__: topic
    for topic in (
        facts.headline,
        facts.yardsticks,
        facts.first_run,
        study_facts.study,
        facts.ablation,
        facts.short_ablation,
        facts.patience,
        facts.crossval,
        facts.evaluation,
        facts.tried,
        facts.recipe,
        facts.faithfulness,
        facts.transfer,
        facts.export,
        facts.fuzzing,
        facts.killing,
        speed_facts.benchmark,
        speed_facts.cost,
        speed_facts.time_to_accuracy,
        speed_facts.precision,
        speed_facts.augmentation,
        speed_facts.scaling,
        tune_facts.tune,
    )
}
BANNER = "<!-- written by `python -m studies.report`: edit docs/templates/{name} -->\n"


@dataclass
class Config:
    """Write README and docs from their templates and what is stored, or check them."""

    check: bool = False  # write nothing; exit code 1 and a line for each fault
    stale: bool = False  # write nothing; list the reports that today's defaults would not make
    root: str | None = None  # the project's folder; default: this one


def main(args: list[str] | None = None) -> None:
    config = cli.parse(Config, args)
    root = Path(config.root or home())
    with cli.one_line_errors():
        if config.stale:
            found = stale.find_stale(root)
            if found:
                print(f"{len(found)} stale reports. A study keeps what is stored: delete it before it is made anew.\n")
            print(stale.as_text(found) if found else "no report is stale")
            print("\nResults that store no hyperparameters to compare, with the day they were measured:")
            print("\n".join(stale.not_comparable(root)))
            return
        faults = check(root) if config.check else write(root)
    if faults:
        print("\n".join(faults))
        cli.fail(f"{len(faults)} fault{'s' * (len(faults) > 1)}, each in a line above", code=1)
    if config.check:
        print("pages and stored results agree")


# ---------------------------------------------------------------------------------------------------------- rendering


class Claim(jinja2.TemplateError):
    """Words of a page that the stored results do not bear out."""


class Typed(str):
    """Words out of an expression that a person typed."""


def holds(words: str, condition: bool) -> Typed:
    """The words, if the results bear them out."""
    if not condition:
        raise Claim(f'says "{words}", which the stored results do not bear out: reword it')
    return Typed(words)


def spread(values: list[float], digits: int = 1) -> str:
    """Mean ± standard deviation of fractions in percent, without the sign; the mean alone of a single one."""
    return bare(np.mean(values), digits) + (f" ± {deviation(values, digits)}" if len(values) > 1 else "")


def bare(fraction: float, digits: int = 1) -> str:
    """In percent, without the sign."""
    return f"{fraction:.{digits}%}"[:-1]


def span(values: float | list[float], unit: float = 60, to: str = " to ") -> str:
    """From the least to the most, in minutes unless `unit` says of how many seconds; with a digit where little."""
    values = [value / unit for value in (values if isinstance(values, list) else [values])]
    digits = 1 if min(values) < 1.5 and any(value % 1 for value in values) else 0
    ends = dict.fromkeys(f"{end:,.{digits}f}" for end in (min(values), max(values)))
    return to.join(ends)


def deviation(values: list[float], digits: int = 1) -> str:
    return bare(np.std(values, ddof=1), digits)


def millions(count: int) -> str:
    return f"{count / 1e6:.{1 if count >= 1e6 else 2}f} M"


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def listed(texts: list[str], last: str = "and") -> str:
    texts = [str(text) for text in texts]
    return f" {last} ".join([", ".join(texts[:-1]), texts[-1]]) if len(texts) > 1 else "".join(texts)


def code(names: list[str]) -> list[str]:
    return [f"`{name}`" for name in names]


def word(count: int) -> str:
    """Small numbers as words."""
    words = "no one two three four five six seven eight nine ten eleven twelve".split()
    return words[count] if 0 <= count < len(words) else f"{count:,}"


FILTERS: dict[str, Callable] = {
    "percent": lambda fraction, digits=1: f"{bare(fraction, digits)} %",
    "fixed": lambda value, digits=1: f"{value:,.{digits}f}",
    "general": lambda value: f"{value:g}",
    "thousands": lambda value: f"{value:,.0f}",
    "rate": lambda value: f"{value:.0e}".replace("e-0", "e-"),
    "difference": lambda value: f"{value:.0e}" if value < 0.001 else f"{value:.1f}",
    "estimate": lambda values: f"{points(values[0])} ({interval_text(values[1:])})",
    "interval": interval_text,
    "minutes": lambda seconds: f"{seconds / 60:.{1 if seconds < 60 else 0}f}",
    "mean": lambda values: float(np.mean(values)),
    "p": lambda value: "< 0.001" if value < 0.001 else f"= {value:.{3 if value < 0.1 else 2}f}",
    "being": lambda verdict: verdict if verdict.startswith("cannot") else f"is {verdict}",
    "megabytes": lambda mega: f"{mega:.0f} MB" if mega < 1000 else f"{mega / 1000:.1f} GB",
    **{
        filter.__name__: filter
        for filter in (holds, bare, points, spread, deviation, span, millions, clock, listed, code, word)
    },
}


def environment(root: Path) -> jinja2.Environment:
    """Jinja's: an undefined key is an error, a block takes no line of its own, and what a key gives is marked."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(root / "docs" / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
        finalize=lambda value: value if isinstance(value, Typed) else f"{OPEN}{value}{CLOSE}",
    )
    env.filters |= FILTERS
    return env


def render(root: Path, name: str) -> tuple[str, list[str]]:
    """A page with marks around what keys gave, and what is wrong with it.

    Raises:
        Claim, UndefinedError, CheckpointError: it cannot be written.
    """
    env = environment(root)
    source, _, _ = env.loader.get_source(env, name)
    tree = env.parse(source)
    values, faults = {}, []
    for topic in sorted(meta.find_undeclared_variables(tree)):
        if topic not in TOPICS:
            raise jinja2.UndefinedError(f"{topic!r} is no topic of studies/report.py")
        values[topic] = TOPICS[topic](root)
        runs = values[topic]["runs"]
        values[topic] |= {"earlier": stale.sentence(runs), "earlier_briefly": stale.sentence(runs, briefly=True)}
    text = env.from_string(source).render(values)
    for topic, found in values.items():
        if not any(found[name] in without_marks(text) for name in ("earlier", "earlier_briefly")):
            faults.append(
                f"rests on stale reports and does not say so: put {{{{ {topic}.earlier }}}} where they are used"
            )
    faults += [f"has a typed value in an expression: {value!r}" for value in typed_in_expressions(tree)]
    banner = "" if name == "README.md" else BANNER.format(name=name)
    return banner + text, faults


def typed_in_expressions(tree: nodes.Template) -> list[Any]:
    """Values that are written into `{{ }}` themselves, and so would pass for a result."""
    found = []
    for output in tree.find_all(nodes.Output):
        for node in output.nodes:
            while isinstance(node, nodes.Filter) and node.name not in ("holds", "format"):
                node = node.node
            if isinstance(node, nodes.Const):
                found.append(node.value)
    return found


def page_path(root: Path, name: str) -> Path:
    return root / name if name == "README.md" else root / "docs" / name


def templates(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "docs" / "templates").glob("*.md"))


def write(root: Path) -> list[str]:
    """Write all pages; returns what is wrong with those that could not be."""
    faults, written = [], []
    for name in templates(root):
        try:
            text = without_marks(render(root, name)[0])
        except (jinja2.TemplateError, CheckpointError) as error:
            faults.append(f"docs/templates/{name} {error}")
            continue
        path = page_path(root, name)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_bytes(path, text.encode())
            written.append(path)
    if written:
        cli.say_written(written)
    else:
        print("all pages are as they were")
    return faults


# ----------------------------------------------------------------------------------------------------------- checking


def check(root: Path) -> list[str]:
    """A line for each fault of pages, notebooks and summaries; prints how many numbers there are of each kind."""
    faults, typed, keyed = outdated(root), Counter(), Counter()
    pages = {f"docs/{path.name}": path.read_text(encoding="utf-8") for path in sorted((root / "docs").glob("*.md"))}
    for name in templates(root):
        path = page_path(root, name)
        shown = path.relative_to(root).as_posix()
        try:
            marked, wrong = render(root, name)
        except (jinja2.TemplateError, CheckpointError) as error:
            faults.append(f"docs/templates/{name} {error}")
            pages.pop(shown, None)
            continue
        faults += [f"docs/templates/{name} {fault}" for fault in wrong]
        there = path.read_text(encoding="utf-8") if path.exists() else ""
        if line := first_difference(there, without_marks(marked)):
            faults.append(
                f"{shown}:{line}, not as its template and the stored results say: run python -m studies.report"
            )
        pages[shown] = marked
    for path in sorted((root / "demos").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        pages[f"demos/{path.name}"] = "\n\n".join(texts)
    for name, text in pages.items():
        found = find_numbers(text, Path(name).name)
        faults += [f"{name} has a typed number: ...{words}..." for words in found.unknown]
        typed, keyed = typed + found.typed, keyed + found.keyed
    print(f"{keyed.total():,} numbers from stored results in {len(templates(root))} pages:")
    print("\n".join(f"  {count:5,}  {kind}" for kind, count in keyed.most_common()))
    print(f"{typed.total():,} typed, all on the list of constants:")
    print("\n".join(f"  {count:5,}  {reason}" for reason, count in typed.most_common()))
    return faults


def first_difference(there: str, wanted: str) -> str:
    """The number of the first line that differs, and what it should be; nothing where the texts are equal."""
    if there == wanted:
        return ""
    old, new = there.split("\n"), wanted.split("\n")
    pairs = zip([*old, *[""] * len(new)], [*new, *[""] * len(old)], strict=False)
    number, (_, line) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    return f"{number + 1}: should be {line[:60]!r}"


def outdated(root: Path) -> list[str]:
    """Summaries of studies that are not of the reports that are stored, each with the command that makes them anew."""
    faults = []
    stored = {path.stem: path for path in (root / "saved" / "studies").glob("*.json")}
    for epochs in (5, 20):
        name = ablation.Config(epochs=epochs).name
        for row in read_json(root / "figures" / f"{name}.json")["rows"]:
            runs = facts.find_runs(root, f"studies/{name}_{row['row']}_seed*").values()
            found = [run["results"]["val_accuracy"] for run in runs]
            if not same_results(row["val_accuracies"], found):
                more = "" if epochs == 5 else f" --epochs {epochs}"
                command = f"python -m studies.ablation --no_train{more}"
                faults.append(f"figures/{name}.json is not of the runs of {row['row']} that are stored: run {command}")
    compared = {
        Path(run["config"].get("name") or "").name: run["results"]
        for run in read_json(root / "figures" / "model_comparison.json")["runs"]
    }
    for name, path in stored.items():
        if re.match("study_(plain|default)_", name) and not same_results(
            read_json(path)["results"], compared.get(name)
        ):
            faults.append(f"figures/model_comparison.json is not of {name}: run python -m studies.compare --no_train")
    accuracy = read_json(root / "saved" / "VisionTransformer.json")["results"]["test_accuracy"]
    of_model = {
        "VisionTransformer_evaluation": ("python evaluate.py saved/VisionTransformer.pt", lambda x: x["accuracy"]),
        **{
            f"VisionTransformer_{seen.replace(' --', '_')}_evaluation": (
                f"python evaluate.py saved/VisionTransformer.pt --{seen}",
                lambda x: x["without"]["accuracy"],
            )
            for seen in ("flip", "flip --shift")
        },
        "VisionTransformer_export": (
            "python export.py saved/VisionTransformer.pt",
            lambda x: x["rows"]["PyTorch"]["accuracy"],
        ),
        "ensemble": (
            "python evaluate.py saved/VisionTransformer.pt saved/CNN.pt --ensemble",
            lambda x: x["members"][0]["accuracy"],
        ),
    }
    for name, (command, of) in of_model.items():
        if abs(of(read_json(root / "figures" / f"{name}.json")) - accuracy) > 0.0005:
            faults.append(f"figures/{name}.json is of another model than saved/VisionTransformer.pt: run {command}")
    for path in (root / "figures").glob("*_seed*_flip_shift_evaluation.json"):
        run = path.name.removesuffix("_flip_shift_evaluation.json")
        if abs(read_json(path)["without"]["accuracy"] - read_json(stored[run])["results"]["test_accuracy"]) > 0.0005:
            faults.append(f"figures/{path.name} is of another model than {run}: run evaluate.py with --flip --shift")
    return faults


if __name__ == "__main__":
    main()
