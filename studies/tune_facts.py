"""What the page on tuning says: as studies/facts.py, of what studies.tune stored."""

from collections import Counter
from pathlib import Path

import numpy as np

from studies.facts import find_runs, read_figures
from studies.tune import Config
from studies.tune_space import SPACES, default_params, flags_of
from support.significance import verdict

SHOWN = 4  # rows beside the default's


def tune(root: Path) -> dict:
    """The search of each model: its best trials and the default, and both at the full length."""
    searches = {model: search(root, model) for model in SPACES}
    return {**searches, "runs": {name: run for found in searches.values() for name, run in found["runs"].items()}}


def search(root: Path, model: str) -> dict:
    stored = read_figures(root, f"tune_{model}")
    config, space = stored["config"], SPACES[model]
    common = Config(model=model, dataset=config["dataset"], epochs=config["epochs"]).common
    default = default_params(space, common)
    finished = [row for row in stored["trials"] if row["state"] == "finished"]
    rows = [
        {
            "name": f"{row['number']}, the default" if row["params"] == default else str(row["number"]),
            "val": row["val_accuracies"][-1],
            "flags": flags_of(row["params"], common),
            "optimizer": row["params"].get("optimizer", "muon"),
            "is_default": row["params"] == default,
        }
        for row in sorted(finished, key=lambda row: -row["val_accuracies"][-1])
    ]
    base = next(row["val"] for row in rows if row["is_default"])
    comparison = compared(stored["comparison"])
    others = {rank: row for rank, row in enumerate(rows) if row["optimizer"] != "muon"}
    return {
        "trials": len(stored["trials"]),
        "epochs": config["epochs"],
        "minutes": sum(row["seconds"] or 0 for row in stored["trials"]) / 60,
        "states": Counter(row["state"] for row in stored["trials"]),
        "rows": [row for rank, row in enumerate(rows) if rank < SHOWN or row["is_default"]],
        "default": base,
        "best": rows[0],
        "muon_first": min(others, default=len(rows)),
        "others_below": base - max((row["val"] for row in others.values()), default=0),
        "compared": comparison,
        "full_epochs": config["full_epochs"],
        "runs": find_runs(root, f"studies/tune_{model}_default_seed*"),
    }


def compared(comparison: list[dict]) -> list[dict]:
    """The default and others at the full length, with their mean differences from the default, and what their intervals
    over seeds say of these; the default has no difference, and one seed no interval."""
    return [
        {
            "name": row["what"].replace("trial", "trial ").replace("default", "the default"),
            "n": len(row["val_accuracy"]),
            "val": float(np.mean(list(row["val_accuracy"].values()))),
            "difference": row.get("difference"),
            "interval": row.get("interval"),
            "p": row.get("p_holm"),
            "verdict": verdict(row["interval"], row["p_holm"]) if row.get("interval") else None,
        }
        for row in comparison
    ]
