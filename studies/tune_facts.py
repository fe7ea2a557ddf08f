"""What the page on tuning says: as studies/facts.py, of what studies.tune stored."""

from collections import Counter
from pathlib import Path

import numpy as np

from studies.facts import find_runs, read_figures
from studies.tune_space import SPACES, default_params, flags_of

SHOWN = 4  # rows beside the default's


def tune(root: Path) -> dict:
    """The search of the CNN: its best trials and the default, and both at the full length."""
    stored = read_figures(root, "tune_cnn")
    config, space = stored["config"], SPACES["cnn"]
    common = f"--model cnn --dataset {config['dataset']} --epochs {config['epochs']} --seed 0 --no_test"
    default = default_params(space, common)
    finished = [row for row in stored["trials"] if row["state"] == "finished"]
    ranked = sorted(finished, key=lambda row: -row["val_accuracies"][-1])
    rows = [
        {
            "name": f"{row['number']}, the default" if row["params"] == default else str(row["number"]),
            "val": row["val_accuracies"][-1],
            "flags": flags_of(row["params"], common),
            "optimizer": row["params"]["optimizer"],
            "is_default": row["params"] == default,
        }
        for row in ranked
    ]
    base = next(row["val"] for row in rows if row["is_default"])
    others = [row["val"] for row in rows if row["optimizer"] != "muon"]
    return {
        "trials": len(stored["trials"]),
        "epochs": config["epochs"],
        "states": Counter(row["state"] for row in stored["trials"]),
        "rows": [row for rank, row in enumerate(rows) if rank < SHOWN or row["is_default"]],
        "default": base,
        "best": rows[0],
        "muon_first": next(rank for rank, row in enumerate(rows) if row["optimizer"] != "muon"),
        "others_below": base - max(others),
        "compared": compared(stored["comparison"]),
        "runs": find_runs(root, "studies/tune_cnn_default_seed*"),
    }


def compared(comparison: list[dict]) -> list[dict]:
    """The default and others at the full length, with their mean differences from the default."""
    return [
        {
            "name": row["what"].replace("trial", "trial ").replace("default", "the default"),
            "n": len(row["val_accuracy"]),
            "val": float(np.mean(list(row["val_accuracy"].values()))),
            "difference": row.get("difference"),  # the default has none
        }
        for row in comparison
    ]
