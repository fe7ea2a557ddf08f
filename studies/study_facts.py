"""What docs/study.md says: as studies/facts.py, of the study that studies.compare stored."""

import re
from pathlib import Path

import numpy as np

from studies.comparison import EARLIER, at_equal_parameters, judge_twice
from studies.facts import find_runs, of_runs, read_figures
from support.significance import verdict


def study(root: Path) -> dict:
    """Of figures/model_comparison.json: `rows` by model, `plain` and `default`: each model's row and difference."""
    stored = read_figures(root, "model_comparison")
    differences = {(row["recipe"], row["model"]): row for row in stored["differences"]}
    recipes = {recipe: {} for recipe in dict.fromkeys(row["recipe"] for row in stored["rows"])}
    for row in stored["rows"]:
        against = differences.get((row["recipe"], row["model"]))
        found = {**row, "n": len(row["seeds"]), "earlier": EARLIER.get(row["model"])}
        if against:
            found |= {"difference": against["difference"], "interval": against["bca"], "p": against["p_holm"]}
            found |= {"verdict": verdict(against["bca"], against["p_holm"])}
        recipes[row["recipe"]][row["model"]] = found
    keys = dict.fromkeys(row["model"] for row in stored["rows"])
    models = [{recipe: rows.get(key) for recipe, rows in recipes.items()} for key in keys]
    groups = {
        recipe: {
            word: [row for row in rows.values() if row.get("verdict") == word and row["model"].startswith("vit")]
            for word in ("above", "below", "cannot be told apart from")
        }
        for recipe, rows in recipes.items()
    }
    patches = {
        recipe: {size: rows[key]["test_accuracy"] for size in (2, 4, 6, 8) if (key := f"vit_patch{size}") in rows}
        for recipe, rows in recipes.items()
    }
    with_cls = [
        (row["plain"], row["default"])
        for row in models
        if all(row.values()) and row["default"]["model"].startswith("vit")
    ]
    at_equal = {}  # under the default recipe: what the ViTs of about a CNN's size are to it
    for row in stored["equal_parameters"]:
        if row["recipe"] == "default":
            at_equal.setdefault(row["reference"], []).append(judge_twice(row))
    return {
        **recipes,
        "epochs": stored["epochs"],
        "n": len(stored["rows"][0]["seeds"]),
        "missing": stored["missing"],
        "groups": groups,
        "others": sum(len(rows) for rows in groups["plain"].values()),
        "plain_largest_p": max((row["p"] for row in groups["plain"]["below"]), default=1.0),
        "sizes": {recipe: list(accuracies) for recipe, accuracies in patches.items()},
        "patches": {recipe: list(accuracies.values()) for recipe, accuracies in patches.items()},
        "gains": {
            **{
                key: recipes["default"][key]["test_accuracy"] - recipes["plain"][key]["test_accuracy"]
                for key in ("cnn", "resnet20", "vit_small")
            },
            "vits": [after - patches["plain"][size] for size, after in patches["default"].items()],
        },
        "cls": {name: [a[name] - b[name] for a, b in with_cls] for name in ("parameters", "flops")},
        "models": models,
        "margin": max(float(np.diff(row["interval"])[0] / 2) for row in stored["rows"]),
        "equal_parameters": [at_equal_parameters(row) for row in stored["equal_parameters"]],
        "at_equal_parameters": {cnn: sorted(set(words)) for cnn, words in at_equal.items()},
        "equal_time": equal_time(root),
        "cnn_val": of_runs(find_runs(root, "studies/study_default_cnn_seed*"))["val"],
        "patch2": {
            row["recipe"]: {**row, "times_the_training": times_the_training(root, row["recipe"], row["seeds"])}
            for row in stored["smaller_patches"]
        },
        "runs": study_runs(root) | {name: run for row in equal_time(root) for name, run in row["runs"].items()},
        "provenance": stored["provenance"],
    }


def times_the_training(root: Path, recipe: str, seeds: list[int]) -> float:
    """How many times as long the runs with patches of 2 took as those with patches of 4 and the same seeds."""
    seconds = {}
    for size in (2, 4):
        names = [f"studies/study_{recipe}_vit_patch{size}_seed{seed}" for seed in seeds]
        seconds[size] = sum(of_runs(find_runs(root, *names))["seconds"])
    return seconds[2] / seconds[4]


def study_runs(root: Path) -> dict[str, dict]:
    names = sorted(
        {re.sub(r"\d+$", "*", path.stem) for path in (root / "saved" / "studies").glob("study_*_seed*.json")}
    )
    return find_runs(root, *(f"studies/{name}" for name in names if "digits" not in name))


def equal_time(root: Path) -> list[dict]:
    """ViTs whose whole run was planned for the CNN's time, by falling validation accuracy."""
    titles = {"patch4": "patches of 4", "patch6": "patches of 6", "patch8": "patches of 8", "small": "the small ViT"}
    rows = []
    for key, title in titles.items():
        if runs := find_runs(root, f"studies/equal_time_{key}"):
            rows.append({"title": title, **of_runs(runs)})
    return sorted(rows, key=lambda row: -row["val"])
