"""What the pages on speed, memory and cost say: as studies/facts.py, of what studies.benchmark and .scaling stored."""

import dataclasses
import statistics
from pathlib import Path

from studies import scaling as study
from studies.benchmark import TARGET
from studies.facts import find_runs, read_figures, recipe
from studies.peers import ReferenceViT
from support.model import num_parameters
from support.report import machine_of, processor_of
from support.significance import paired_t

PEERS = ["timm", "vit-pytorch"]
YEAR = 365.25 * 24 * 3600
EASY = 0.58  # validation accuracy that the reference reaches while it still rises


def benchmark(root: Path) -> dict:
    """A training step on each kind of processor on which it was measured: figures/benchmark_*.json."""
    kinds = [read_figures(root, path.stem) for path in sorted((root / "figures").glob("benchmark_*.json"))]
    rows = [row for stored in kinds for row in step_rows(stored)]
    kept = [{"where": processor_of(stored["provenance"]), **stored["memory"]} for stored in kinds]
    pipelines = [{"where": processor_of(stored["provenance"]), **stored["pipeline"]} for stored in kinds]
    return {"rows": rows, "kept": kept, "pipelines": pipelines, "runs": {}}


def step_rows(stored: dict) -> list[dict]:
    """One for each precision: ours in ms, and how many times as long the others take, each (CLS token, mean)."""
    medians, rows = stored["step"]["medians"], []
    reference, *small = ("reference, MLP ratio 1", "ours, MLP ratio 1, CLS", "ours, MLP ratio 1, mean")
    for precision, rate in stored["step"]["flops_per_second_of_products"].items():
        tail = "" if precision == "fp32" else f", {precision}"
        peers = {peer: f"{peer}, MLP ratio 4{tail}" for peer in PEERS}
        mine = [medians[f"ours, MLP ratio 4, {pooling}{tail}"] for pooling in ("CLS", "mean")]
        rows.append(
            {
                "where": processor_of(stored["provenance"]),
                "precision": precision,
                "ms": [1000 * seconds for seconds in mine],
                "reference": None if tail else [medians[reference] / medians[name] for name in small],
                **{peer.replace("-", "_"): [medians[name] / s for s in mine] for peer, name in peers.items()},
                "rate": rate,
                "share": stored["step"]["shares_of_that_rate"][precision],
                "over_timm_fp32": [medians["timm, MLP ratio 4"] / seconds for seconds in mine] if tail else None,
            }
        )
    return rows


def cost(root: Path) -> dict:
    """How a step's time and memory grow: the exponents of figures/cost.json."""
    stored = read_figures(root, "cost")
    exponents = {name.replace(" ~ ", "_of_"): value for name, value in stored["exponents"].items()}
    return {"exponents": exponents, "where": processor_of(stored["provenance"]), "runs": {}}


def seconds_to(root: Path, name: str, target: float) -> float:
    """Of the processor, until this part of the validation images was right for the first time."""
    history = read_figures(root, f"time_to_accuracy_{name}")["history"]
    return next(row["cpu_seconds"] for row in history if row["val_accuracy"] > target)


def time_to_accuracy(root: Path) -> dict:
    """Seconds of reference and quick until the target, and the reference's whole run of 20 epochs."""
    stored, reference = read_figures(root, "time_to_accuracy"), ReferenceViT()
    easy = {
        name: [seconds_to(root, f"{name}_{seed}", EASY) for seed in range(len(rows))]
        for name, rows in stored["reached"].items()
    }
    whole = read_figures(root, "whole_run_reference_0")["history"][-1]
    found = {}
    for name, rows in stored["reached"].items():
        found[name] = {
            "epochs": sorted(row["epoch"] for row in rows),
            "wall": sorted(row["wall_seconds"] for row in rows),
            "processor": sorted(row["cpu_seconds"] for row in rows),
            "n": len(rows),
        }
        found[name] |= {f"median_{clock}": statistics.median(found[name][clock]) for clock in ("wall", "processor")}
    cct, whole_runs = read_figures(root, "whole_run_cct_2_0"), read_figures(root, "whole_runs")
    return {
        **found,
        "ratios": stored["ratios"],
        "target": TARGET,
        "reference_rate": 5e-4,  # of studies/peers.py
        "reference_sizes": {"tokens": reference.position.shape[1], "parameters": num_parameters(reference)},
        "where": processor_of(stored["provenance"]),
        "easy": {"target": EASY, "ratio": statistics.median(easy["reference"]) / statistics.median(easy["quick"])},
        "whole": whole,
        "whole_runs": {row["training"]: row for row in whole_runs["rows"]},
        "whole_runs_machine": processor_of(whole_runs["provenance"]),
        "cct": {**cct, "last": cct["history"][-1]},
        "provenance": stored["provenance"],
        "runs": {},
    }


def precision(root: Path) -> dict:
    """What bf16 gives on each kind of processor (figures/precision_*.json), and whether it costs accuracy: that of the
    default on validation images, trained in fp32 and in bf16, seed by seed."""
    stored = [read_figures(root, path.stem) for path in sorted((root / "figures").glob("precision_*.json"))]
    small = recipe(root)["small"]["parameters"]
    kinds = [{**kind, "where": processor_of(kind["provenance"])} for kind in stored]
    full, low = (
        {run["config"]["seed"]: (path, run) for path, run in find_runs(root, pattern).items()}
        for pattern in ("studies/fp32_seed*", "studies/study_default_vit_patch4_seed*")
    )
    seeds = [seed for seed in sorted(full.keys() & low.keys()) if low[seed][1]["config"]["precision"] == "bf16"]
    pairs = [[of[seed][1]["results"]["val_accuracy"] for seed in seeds] for of in (full, low)]
    where = [sorted({machine_of(of[seed][1]["provenance"]) for seed in seeds}) for of in (full, low)]
    return {
        "kinds": kinds,
        # measured before `small` got the sizes that it has
        "earlier_small": [kind["where"] for kind in kinds if kind.get("parameters", {}).get("small") != small],
        "fp32_seconds": [full[seed][1]["results"]["training_seconds"] for seed in seeds],
        "fp32": pairs[0],
        "bf16": pairs[1],
        "by_seed": paired_t(*pairs) if seeds else None,
        "fp32_where": where[0],
        "bf16_where": where[1],
        "runs": dict(of[seed] for of in (full, low) for seed in seeds),
    }


def augmentation(root: Path) -> dict:
    """images/s of the loader and of an epoch, and what that is less than without augmentation."""
    stored = read_figures(root, "augmentation_cost")
    rates = stored["images_per_second"]
    rows = {name: {**row, "cost": 1 - row["epoch"] / rates["none"]["epoch"]} for name, row in rates.items()}
    where, precision = processor_of(stored["provenance"]), stored.get("precision", "fp32")
    return {"rows": rows, "where": where, "precision": precision, "provenance": stored["provenance"], "runs": {}}


def scaling(root: Path) -> dict:
    """Throughput, memory and the plan, as figures/scaling.json has them, the plan also for other numbers of GPUs."""
    stored = read_figures(root, "scaling")
    rows = stored["throughput"]
    wide = {
        size: [row for row in rows if row["hidden_size"] == size] for size in sorted({r["hidden_size"] for r in rows})
    }
    pairs = []
    for size, members in wide.items():
        threads, processes = (
            next(row for row in members if (row["processes"], row["threads"]) == cores) for cores in ((1, 2), (2, 1))
        )
        pairs.append(
            {
                "hidden_size": size,
                "of_threads": processes["images_per_second"] / threads["images_per_second"],
                "speedup": processes["speedup"],
                "step": 128 / processes["images_per_second"],
                "all_reduce": processes["all_reduce_seconds"],
            }
        )
    memory = [{"img_size": 32, "mlp_ratio": 4.0, **row} for row in stored["memory"]["rows"]]

    def on_gpus(**assumptions) -> dict:
        config = dataclasses.replace(study.Config(), **assumptions)
        found = study.on_gpus(config, stored["plan"]["parameters"], stored["plan"]["training_flops_per_image"])
        seconds = found["communication_seconds_per_step"], found["compute_seconds_per_step"]
        return {**found, "share": seconds[0] / sum(seconds)}

    assumed = dataclasses.asdict(study.Config())
    wide_model = next(row for row in memory if row["hidden_size"] == pairs[-1]["hidden_size"])

    first = [row for row in memory if default_sizes(row) and row["batch_size"] == 128]
    others = [row for row in memory if row not in first]
    return {
        "throughput": rows,
        "precision": rows[0].get("precision", "fp32"),
        "where": processor_of(stored["provenance"]["throughput"]),
        "pairs": pairs,
        "base_mb": stored["memory"]["base_mb"],
        "memory": unique([*first, *others]),
        "worst": max(memory, key=lambda row: abs(row["error"])),
        "imagenet": memory[-1],
        "plan": stored["plan"],
        "plans": [on_gpus(gpus=1), on_gpus(), on_gpus(machines=4)],
        "fast_gigabits": 400,
        "fast_network": on_gpus(machines=4, network_gigabits_per_second=400),
        "assumed": assumed,
        "gradient_mb": 4 * wide_model["parameters"] / 1e6,
        "largest_error": max(abs(row["error"]) for row in memory),
        "years": assumed["epochs"] * assumed["images"] / memory[-1]["batch_size"] * memory[-1]["seconds"] / YEAR,
        "provenance": stored["provenance"],
        "runs": {},
    }


def default_sizes(row: dict) -> bool:
    return (row["patch_size"], row["hidden_size"], row["num_blocks"], row.get("mlp_ratio", 4)) == (4, 64, 4, 4)


def unique(rows: list[dict]) -> list[dict]:
    """Rows without those whose sizes were there before."""
    found = {}
    for row in rows:
        sizes = tuple(row.get(name) for name in ("batch_size", "img_size", "patch_size", "hidden_size", "num_blocks"))
        found.setdefault((*sizes, row.get("mlp_ratio", 4)), row)
    return list(found.values())
