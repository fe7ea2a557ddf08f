"""What README and docs say of results: one function for each topic, which reads what is stored and gives plain values.

A topic's values are what the templates in docs/templates/ name: `{{ headline.vit.parameters | thousands }}`. Fractions
stay fractions and seconds seconds: filters of studies/report.py make text of them. Every topic may have `runs`, the
reports of train.py that it rests on by their path, and `provenance`, that of the file it was read from.
"""

import dataclasses
import functools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

import train
from network import ResNet20
from studies.ablation import ROWS, Config
from studies.compare import forward_flops
from support import cli, schema
from support.model import num_parameters
from support.report import machine_of, processor_of, read_json
from support.significance import verdict, wilson
from training.models import build_model
from training.presets import PRESETS
from training.trained import views

# what is needed of a report: those of early versions lack the rest
REPORT = {"results": schema.RESULTS, "config": {"epochs": schema.EPOCHS}, "provenance": schema.REPORT["provenance"]}
TINY_FLOPS = 2_507_366_400  # of timm's vit_tiny_patch16_224 for one image, as training.models.count_flops counts them
TRAINING = 40_000  # images of CIFAR-10 that train.py trains on unless told otherwise
HELD_OUT = 10_000  # ... and holds out for validation
IMAGES = 10_000  # that CIFAR-10 has for testing

# the rows of the main table: key -> title, flags to train.py, the reports' names below saved/ (a star for several)
HEADLINES = {
    "vit": ("Vision Transformer", "", ("studies/study_default_vit_patch4_seed*",)),
    "accurate": ("ViT behind convolutions, wide", "--preset accurate", ("studies/accurate_seed*",)),
    "best": ("ViT behind convolutions, wide, all images", "--preset best", ("studies/best_seed*",)),
    "small": ("ViT behind convolutions, narrow", "--preset small", ("studies/small_seed*",)),
    "small_all": (
        "ViT behind convolutions, narrow, all images",
        "--preset small --val_fraction 0",
        ("studies/small_all_seed*",),
    ),
    "quick": ("small ViT, for seconds", "--preset quick", ("studies/quick_seed*",)),
    "resnet20": ("ResNet-20", "--model resnet20", ("studies/study_default_resnet20_seed*",)),
    "cnn": ("CNN", "--model cnn", ("studies/study_default_cnn_seed*",)),
}


def find_runs(root: Path, *names: str) -> dict[str, dict]:
    """The reports of these runs, by path: `studies/quick_seed*` is all of that pattern whose star is a number."""
    found = {}
    for name in names:
        pattern = re.compile(re.escape(Path(name).name).replace(r"\*", r"\d+"))
        folder = (root / "saved" / name).parent
        paths = [path for path in sorted(folder.glob("*.json")) if pattern.fullmatch(path.stem)]
        for path in sorted(paths, key=lambda path: (len(path.stem), path.stem)):
            found[path.relative_to(root).as_posix()] = _read(path, path.stat().st_mtime_ns, True)
    return found


def read_figures(root: Path, name: str) -> dict:
    path = root / "figures" / f"{name}.json"
    return _read(path, path.stat().st_mtime_ns, False) if path.exists() else read_json(path)


@functools.cache
def _read(path: Path, _changed: int, is_report: bool) -> dict:
    return read_json(path, REPORT if is_report else None)


def of_runs(runs: dict[str, dict]) -> dict[str, Any]:
    """What a row of a table says of runs that differ in their seed; None where it is not known. What comes of the test
    images is left out if a run has not seen them."""
    results = [run["results"] for run in runs.values()]
    first = next(iter(runs.values()))
    processor = [result["processor_seconds"] for result in results if result.get("processor_seconds")]
    validated = [result["val_accuracy"] for result in results if result["val_accuracy"] is not None]
    tested = {}
    if all("test_accuracy" in result for result in results):  # without --no_test
        tested["test"] = [result["test_accuracy"] for result in results]
        tested["margin"] = float(np.diff(wilson(np.mean(tested["test"]), IMAGES))[0] / 2)
    return {
        "runs": runs,
        "n": len(runs),
        "parameters": results[0]["parameters"],
        "epochs": first["config"]["epochs"],
        "images": training_images(first["config"].get("val_fraction", 1)),
        "threads": first["provenance"]["threads"],
        "val": float(np.mean(validated)) if validated else None,
        **tested,
        "seconds": [result["training_seconds"] for result in results],
        "processor_seconds": processor if len(processor) == len(results) else None,
        "precisions": sorted({run["config"]["precision"] for run in runs.values()}),
    }


# ------------------------------------------------------------------------------------------------- the main tables


def headline(root: Path) -> dict:
    """The main table's rows by key, those that have a run; `rows`, in its order; and beside what others report."""
    found = {}
    for key, (title, flags, names) in HEADLINES.items():
        if runs := find_runs(root, *names):
            command = f"python train.py {flags}".strip()
            found[key] = {"key": key, "title": title, "command": command, **of_runs(runs)}
            found[key]["with_views"] = accuracies_with_views(root, runs)
    rows = list(found.values())
    runs = {name: run for row in rows for name, run in row["runs"].items()}
    where = sorted({machine_of(run["provenance"]) for run in runs.values()})
    return {**found, "rows": rows, "runs": runs, "where": where}


def training_images(val_fraction: float) -> int:
    return TRAINING if val_fraction else TRAINING + HELD_OUT


def accuracies_with_views(root: Path, runs: dict[str, dict]) -> list[float]:
    """Of the test images, by those of the runs whose answers over flips and shifts are stored."""
    paths = [root / "figures" / f"{Path(name).stem}_flip_shift_evaluation.json" for name in runs]
    return [read_figures(root, path.stem)["accuracy"] for path in paths if path.exists()]


def yardsticks(root: Path) -> dict:
    """What others report, and ours among it, from the least accurate to the most."""
    rows = read_json(Path(__file__).with_name("yardsticks.json"))["rows"]
    ours = [
        {"ours": True, "order": 100 * float(np.mean(row["test"])), **row}
        for row in headline(root)["rows"]
        if row["key"] != "quick"
    ]
    others = [{"ours": False, "order": row["accuracies"][0], **row} for row in rows]
    return {"rows": sorted([*others, *ours], key=lambda row: row["order"]), "runs": {}}


def first_run(root: Path) -> dict:
    """What train.py printed of the epochs of the default's first run, and its sizes. `committed`: whether the committed
    model is that run."""
    run = next(iter(find_runs(root, *HEADLINES["vit"][2]).values()))
    saved = find_runs(root, "VisionTransformer")["saved/VisionTransformer.json"]
    epochs = epochs_of(run)
    falls = epochs[-1]["val_loss"] <= 1.01 * min(epoch["val_loss"] for epoch in epochs)
    return {
        "first": epochs[:2],
        "last": epochs[-1],
        "falls_to_the_end": falls,
        "results": run["results"],
        "config": run["config"],
        "committed": saved["results"]["test_accuracy"] == run["results"]["test_accuracy"],
        "runs": {},
    }


def epochs_of(run: dict) -> list[dict]:
    """Of each epoch: accuracy and loss of the training images as they were met, and of the validation images; images a
    second, and seconds of training that were left, as far as one knew."""
    metrics, seconds = run["metrics"], run["val_seconds"]
    ends, steps = metrics["val_step"], metrics["train_step"]
    size, rows = run["config"]["batch_size"], []
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        # an entry is of the steps since the one before: every step's, or in early versions the mean of 50
        entries = [i for i, step in enumerate(steps) if start < step <= end]
        met = [size * (steps[i] - max(start, steps[i - 1] if i else 0)) for i in entries]
        met[-1] -= max(0, size * (end - start) - TRAINING)  # the epoch's last batch is smaller
        row = {"number": number + 1, "rate": TRAINING / (seconds[number] - (seconds[number - 1] if number else 0))}
        row |= {"left": seconds[number] / (number + 1) * (len(ends) - number - 1)}
        for what in ("accuracy", "loss"):
            row[f"train_{what}"] = float(np.average([metrics[f"train_{what}"][i] for i in entries], weights=met))
            row[f"val_{what}"] = metrics[f"val_{what}"][number]
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------------- the recipe


def ablation(root: Path) -> dict:
    """Of figures/ablation_20epochs.json, which is as long as the default recipe: rows by key; `order`, those first that
    cost the most; `where` each seed was trained, and in which precision."""
    found = ablation_of(root, 20)
    rows = found["rows"]
    alike = [row["contains_0"] or abs(row["difference"]) < 0.01 for row in (rows["no_warmup"], rows["no_smoothing"])]
    compared = rows.keys() - {"default", "adamw_slow", "adamw_fast"}  # the rates' rows are there for AdamW's
    order = sorted(compared, key=lambda key: rows[key]["difference"])
    where = {}
    for run in sorted(found["runs"].values(), key=lambda run: run["config"]["seed"]):
        machine = f"{machine_of(run['provenance'])} in {run['config']['precision']}"
        where.setdefault(run["config"]["seed"], set()).add(machine)
    return {
        **found,
        "order": order,
        "alike": all(alike),
        "where": {seed: sorted(machines) for seed, machines in where.items()},
    }


def short_ablation(root: Path) -> dict:
    """Of figures/ablation.json: the same for five epochs and more rows, and what they say together."""
    found = ablation_of(root, 5)
    rows = found["rows"]
    strong = [key for key, row in rows.items() if key == "drop_path" or row["title"].endswith("ment added")]
    strong += [key for key in ("random_erasing", "mixup", "cutmix") if key in rows]
    return {
        **found,
        "order": sorted(("adamw", "constant", "cls"), key=lambda key: rows[key]["mean"]),  # without what most is lost
        "cooldowns_alike": all(abs(rows[key]["difference"]) < 0.01 for key in ("linear", "one_cycle")),
        "augmentation_pays": any(rows[key]["difference"] > 0.005 for key in strong),
        "regularisers": [-rows[key]["difference"] for key in strong],
    }


def ablation_of(root: Path, epochs: int) -> dict:
    name = Config(epochs=epochs).name
    stored = read_figures(root, name)
    runs = find_runs(root, *(f"studies/{name}_{row['row']}_seed*" for row in stored["rows"]))
    rows = [
        {
            **row,
            "n": len(row["val_accuracies"]),
            "contains_0": row["interval"] is not None and row["interval"][0] <= 0 <= row["interval"][1],
            "command": f"python train.py --epochs {epochs} {ROWS[row['row']].flags}".strip(),
        }
        for row in stored["rows"]
    ]
    # of the processor, which early runs did not note
    seconds = [r.get("processor_seconds") or r["training_seconds"] for r in (run["results"] for run in runs.values())]
    return {
        "rows": {row["row"]: row for row in rows},
        "epochs": epochs,
        "several": sum(row["n"] > 1 for row in rows),
        "n": len(runs),
        "hours": sum(seconds) / 3600,
        "last": {
            row["row"]: epochs_of(found)[-1]
            for row in rows
            if (found := runs.get(f"saved/studies/{name}_{row['row']}_seed0.json"))
        },
        "runs": runs,
    }


def patience(root: Path) -> dict:
    """A run without augmentation that stops early, and the same to its end."""
    names = ("studies/patience_seed0", "studies/ablation_20epochs_no_augmentation_seed0")
    (stopped,), (whole,) = (list(find_runs(root, name).values()) for name in names)
    turn = 1 + int(np.argmin(whole["metrics"]["val_loss"]))
    results = {"stopped": stopped["results"], "whole": whole["results"], "turn": turn}
    results["planned"] = stopped["config"]["epochs"]
    return {**results, "patience": stopped["config"]["patience"], "runs": find_runs(root, *names)}


def crossval(root: Path) -> dict:
    stored = read_figures(root, "crossval")
    mean = stored["val_accuracy"]["mean"]
    return {
        **stored,
        "each": stored["val_accuracy"]["each"],
        "deviation": stored["val_accuracy"]["std"],
        "chance": math.sqrt(mean * (1 - mean) * stored["folds"] / (TRAINING + HELD_OUT)),
        "epochs": stored["trained"]["epochs"],
        "runs": {"crossval": stored},
    }


def evaluation(root: Path) -> dict:
    """Of the committed models: calibration, the ensemble of the two, and mirrored images."""
    stored = read_figures(root, "ensemble")
    members = {member["name"]: member for member in stored["members"]}
    vit, flip, flip_shift = (
        read_figures(root, f"VisionTransformer{seen}_evaluation") for seen in ("", "_flip", "_flip_shift")
    )
    return {
        "vit": vit,
        "cnn": members["CNN"],
        "gain": members["VisionTransformer"],
        "ensemble": stored["ensemble"],
        "flip": flip["without"],
        "flip_shift": flip_shift["without"],
        "views": len(views(torch.zeros(1, 3, 2, 2), flip=True, shift=True)),
        "bins": len(vit["calibration"]),
        # more right than sure, over all images
        "modest": vit["accuracy"]
        > sum(bin["images"] * (bin["confidence"] or 0) for bin in vit["calibration"]) / vit["images"],
        "runs": {},
    }


def tried(root: Path) -> dict:
    stored = read_figures(root, "tried_on_gpu")
    groups = [
        {
            "title": group["group"],
            "rows": [
                {
                    "change": row["change"],
                    "n": len(row["val_accuracy"]),
                    "mean": float(np.mean(row["val_accuracy"])) / 100,
                }
                for row in group["rows"]
            ],
        }
        for group in stored["groups"]
    ]
    by_change = [{row["change"]: row["mean"] for row in group["rows"]} for group in groups]
    return {"groups": groups, "vit": by_change[0], "quick": by_change[3], "runs": {}}


def recipe(_root: Path) -> dict:
    """Today's defaults, by preset: what `train.py --preset NAME` trains with, and the 10^15 operations of that."""
    found = {}
    for preset in PRESETS:
        config = cli.parse(train.Config, ["--preset", preset], train.dependent_defaults, remember=False)
        values = dataclasses.asdict(config)
        tokens = (config.img_size // config.patch_size) ** 2
        values |= {"tokens": tokens, "head_size": config.hidden_size // config.num_heads}
        model = build_model(config.model, values, config.img_size, 10).eval()
        images = config.epochs * training_images(config.val_fraction)
        # going back takes twice as many operations as going forward
        values |= {"pflops": 3 * images * forward_flops(model, config.img_size) / 1e15}
        values |= {"parameters": num_parameters(model)}
        found[preset] = values
    by_tokenizer = {}
    for preset, values in found.items():
        by_tokenizer.setdefault(values["tokenizer"], []).append(preset)
    found |= {"rates": train.RATES, "by_tokenizer": by_tokenizer, "resnet20": num_parameters(ResNet20())}
    return {**found, "runs": {}}


# --------------------------------------------------------------------------------------- other studies' one file each


def faithfulness(root: Path) -> dict:
    """Areas in fractions, differences from random with their intervals, and what comparing each two methods gave."""
    stored = read_figures(root, "VisionTransformer_and_2_more_faithfulness")
    rankings, tests = stored["rankings"], {"deletion": 1, "insertion": -1}  # the sign of what is better
    order = {
        test: sorted(
            (name for name in rankings if name != "random"), key=lambda name: sign * rankings[name][test]["area"]
        )
        for test, sign in tests.items()
    }
    same = verdict([0, 0], 1)
    differ = [pair for pair in stored["pairs"] if verdict(pair["interval"], pair["p"]) != same]
    runs = find_runs(root, *(Path(path).relative_to("saved").with_suffix("").as_posix() for path in stored["models"]))
    return {
        **stored,
        "steps": len(stored["removed"]) - 1,
        "order": order,
        # over the images; and of those that differ, which do over the models too
        "unsure": [pair for pair in stored["pairs"] if pair not in differ],
        "sure": [pair for pair in differ if verdict(*(pair["over_models"][key] for key in ("interval", "p"))) != same],
        "better_than_random": all(
            tests[pair["test"]] * difference > 0
            for pair in stored["pairs"]
            if pair["ranking"] == "random"
            for difference in pair["by_model"]
        ),
        "attention_is_last": all(names[-1] == "attention" for names in order.values()),
        "seeds": [run["config"]["seed"] for run in runs.values()],
        "precisions": [run["config"]["precision"] for run in runs.values()],
        "runs": runs,
    }


def transfer(root: Path) -> dict:
    stored = read_figures(root, "transfer")
    rows = {}
    for row in stored["table"]:
        rows.setdefault(row["images"], {"images": row["images"], "runs": row["runs"]})[row["start"]] = row["accuracy"]
    return {
        "rows": list(rows.values()),
        "fractions": stored["config"]["fractions"],
        "tiny_over_ours": TINY_FLOPS / stored_flops(root),
        "provenance": stored["provenance"],
        "runs": {},
    }


def stored_flops(root: Path) -> int:
    """Of the default ViT for one image, as the study has them."""
    rows = read_figures(root, "model_comparison")["rows"]
    return next(row["flops"] for row in rows if (row["recipe"], row["model"]) == ("default", "vit_patch4"))


def export(root: Path) -> dict:
    stored = read_figures(root, "VisionTransformer_export")
    rows = stored["rows"]
    onnx, small = rows["ONNX Runtime"], rows["ONNX Runtime, 8 bits"]
    shorter = small["milliseconds_batch_128"] / onnx["milliseconds_batch_128"]
    where = processor_of(stored["provenance"])
    return {**stored, "smaller": small["bytes"] / onnx["bytes"], "shorter": shorter, "where": where, "runs": {}}


def fuzzing(root: Path) -> dict:
    """What tests.fuzz counted: rows by family of files."""
    stored = read_figures(root, "fuzz")
    titles = {
        "model": "models",
        "checkpoint": "checkpoints",
        "report": "reports",
        "answers": "answers of a study",
        "picture": "pictures, alone and in folders",
        "cifar": "files and archive of CIFAR-10",
    }
    rows = [
        {**row, "title": titles[row["family"]], "faults": row["cases"] - row["accepted"] - row["refused"]}
        for row in stored["rows"]
    ]
    found = {name: sum(row[name] for row in rows) for name in ("cases", "faults")}
    return {**found, "each": rows[0]["cases"], "seed": stored["seed"], "rows": rows, "runs": {}}


def killing(root: Path) -> dict:
    """What tests.crash_test counted: rows by kind of run."""
    stored = read_figures(root, "crash_test")
    titles = {
        "vit": "ViT: Muon, crops and mirroring, stochastic depth, averaged weights",
        "conv": "ViT with a conv tokenizer: Muon, Mixup, averaged weights",
        "torchrun": "two processes under `torchrun`",
    }
    rows = [{**row, "title": titles[row["configuration"]]} for row in stored["rows"]]
    return {**stored, "rows": rows, "runs": {}}
