"""What docs/study.md says: as studies/facts.py, of the study that studies.compare stored."""

import re
from pathlib import Path

import numpy as np

from studies.comparison import EARLIER, at_equal_parameters
from studies.facts import find_runs, of_runs, read_figures
from support.significance import mcnemar_p, verdict


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
    models = [{"plain": recipes["plain"].get(key), "default": row} for key, row in recipes["default"].items()]
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
        (row["plain"], row["default"]) for row in models if row["default"]["model"].startswith("vit") and row["plain"]
    ]
    return {
        **recipes,
        "epochs": stored["epochs"],
        "n": len(stored["rows"][0]["seeds"]),
        "missing": stored["missing"],
        "groups": groups,
        "others": sum(len(rows) for rows in groups["plain"].values()),
        "plain_largest_p": max(row["p"] for row in recipes["plain"].values() if "p" in row),
        "sizes": {recipe: list(accuracies) for recipe, accuracies in patches.items()},
        "patches": {recipe: list(accuracies.values()) for recipe, accuracies in patches.items()},
        "gains": {
            "cnn": recipes["default"]["cnn"]["test_accuracy"] - recipes["plain"]["cnn"]["test_accuracy"],
            "vits": [after - patches["plain"][size] for size, after in patches["default"].items()],
        },
        "cls": {name: [a[name] - b[name] for a, b in with_cls] for name in ("parameters", "flops")},
        "models": models,
        "margin": max(float(np.diff(row["interval"])[0] / 2) for row in stored["rows"]),
        "images": stored["images"],
        "equal_parameters": [at_equal_parameters(row) for row in stored["equal_parameters"]],
        "equal_time": equal_time(root),
        "cnn_val": of_runs(find_runs(root, "studies/study_default_cnn_seed*"))["val"],
        "patch2": {recipe: patch2_against_patch4(stored["runs"], recipe) for recipe in recipes if 2 in patches[recipe]},
        "runs": study_runs(root) | {name: run for row in equal_time(root) for name, run in row["runs"].items()},
        "provenance": stored["provenance"],
    }


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


def patch2_against_patch4(runs: list[dict], recipe: str, draws: int = 10_000) -> dict:
    """Patches of 2 minus patches of 4: means over seeds with the paired bootstrap's interval, and seed by seed."""
    groups = [
        {
            run["config"]["seed"]: np.array(list(run["correct"])) == "1"
            for run in runs
            if run["recipe"] == recipe
            and run["config"]["model"] == "vit"
            and run["config"]["patch_size"] == size
            and run["config"]["hidden_size"] == 64
        }
        for size in (2, 4)
    ]
    difference = np.mean(list(groups[0].values()), axis=0) - np.mean(list(groups[1].values()), axis=0)
    values, counts = np.unique(difference, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(difference), counts / len(difference), size=draws)
    both = sorted(groups[0].keys() & groups[1].keys())
    by_seed = [float(groups[0][seed].mean() - groups[1][seed].mean()) for seed in both]
    p = max(mcnemar_p(groups[0][seed], groups[1][seed]) for seed in both)
    interval = np.quantile(drawn @ values / len(difference), [0.025, 0.975]).tolist()
    return {"difference": float(difference.mean()), "interval": interval, "seeds": both, "by_seed": by_seed, "p": p}
