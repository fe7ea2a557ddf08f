"""What the files hold that are read: one table for each kind, and the check of a file against it.

A table is a dict with the keys that must be there, each with what its value must be: another dict, a list of one kind,
or a Kind. Further keys are allowed, as another version may know more. `{...: kind}` is a dict with any keys.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Kind(NamedTuple):
    """What a single value must be, in words and as a test."""

    what: str
    fits: Callable[[Any], bool]


def is_whole(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < 2**53


def is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


def maybe(kind: Kind) -> Kind:
    return Kind(f"{kind.what} or null", lambda value: value is None or kind.fits(value))


def numbers(dtype: torch.dtype | None = None) -> Kind:
    """A tensor of finite numbers with one axis."""
    return Kind(
        "a tensor of numbers with one axis" + (f" in {dtype}" if dtype else ""),
        lambda x: (
            isinstance(x, torch.Tensor)
            and x.ndim == 1
            and not x.is_complex()
            and (dtype is None or x.dtype == dtype)
            and bool(x.isfinite().all())
        ),
    )


TEXT = Kind("text", lambda value: isinstance(value, str))
COUNT = Kind("a whole number, at least 0", lambda value: is_whole(value, 0))
SIZE = Kind("a whole number, at least 1", lambda value: is_whole(value, 1))
NUMBER = Kind("a finite number", is_finite)
POSITIVE = Kind("a finite number above 0", lambda value: is_finite(value) and value > 0)
NOT_NEGATIVE = Kind("a finite number, at least 0", lambda value: is_finite(value) and value >= 0)
EPOCHS = Kind(
    "a number above 0, an integer where it is whole",
    lambda x: SIZE.fits(x) or (type(x) is float and POSITIVE.fits(x) and not x.is_integer()),
)
FRACTION = Kind("a number from 0 to 1", lambda value: is_finite(value) and 0 <= value <= 1)
TENSOR = Kind("a tensor", lambda value: isinstance(value, torch.Tensor))
PLAIN = Kind("a plain value", lambda value: not isinstance(value, torch.Tensor))
ANYTHING = Kind("anything", lambda value: True)
CLASSES = Kind(
    "a list of two or more names, all different",
    lambda value: (
        isinstance(value, list) and all(isinstance(x, str) for x in value) and len(set(value)) == len(value) >= 2
    ),
)


def three(kind: Kind) -> Kind:
    return Kind(
        f"three values, one for each colour, each {kind.what}",
        lambda value: isinstance(value, list) and len(value) == 3 and all(map(kind.fits, value)),
    )


def optional(table: dict, **more: Any) -> dict:
    """The table, with further keys that are checked where they are there."""
    return {**table, OPTIONAL: more}


OPTIONAL = object()  # the key in a table that says so

# ------------------------------------------------------------------------------------------------------- the tables

MODEL = {  # saved/<name>.pt, by Model.save
    "model": TEXT,
    "config": {...: PLAIN},
    "weights": {...: TENSOR},
    "metadata": {...: ANYTHING},
}
PARTS = optional({"train": TEXT, "val": TEXT}, test=TEXT)  # fingerprints of their images
NORMALISATION = {"mean": three(NUMBER), "std": three(POSITIVE)}
ORIGIN = {"source": TEXT, "image_size": SIZE, "fingerprints": PARTS, "seen": {...: {"train": TEXT, "val": TEXT}}}
METADATA = optional({"dataset": TEXT, "classes": CLASSES, **NORMALISATION}, **ORIGIN)  # of a model by train.py
RESULTS = optional(
    {
        "parameters": COUNT,
        "val_accuracy": maybe(FRACTION),  # null where nothing was validated
        "val_loss": maybe(NUMBER),
        "training_seconds": NOT_NEGATIVE,
    },
    processor_seconds=maybe(NOT_NEGATIVE),
    test_loss=NUMBER,  # not there with --no_test
    test_accuracy=FRACTION,
)
MEASURES = {"loss": NUMBER, "accuracy": FRACTION, "step": COUNT}
METRICS = {part: {f"{part}_{what}": [kind] for what, kind in MEASURES.items()} for part in ("train", "val")}
CHECKPOINT = optional(  # saved/<name>.checkpoint, by training/checkpoints.py
    {
        "config": optional({"optimizer": TEXT, "batch_size": SIZE, ...: PLAIN}, grad_accum=SIZE, epochs=EPOCHS),
        "results": maybe(Kind("results", lambda value: fits(value, RESULTS))),
        "runner": {
            "model": {...: TENSOR},
            "optimizer": {...: ANYTHING},  # compared with the optimiser's own state, see training/optim.py
            "scaler": {...: NUMBER},
            "callbacks": {...: {...: ANYTHING}},
            "metrics": {name: numbers() for names in METRICS.values() for name in names},
            "progress": {"epoch": COUNT, "batch": COUNT, "step": COUNT, "skipped": COUNT},
            "totals": numbers(),
            "random_state": numbers(torch.uint8),
            "cuda_random_state": [numbers(torch.uint8)],
        },
    },
    fingerprints=PARTS,
    before=TEXT,
)
REPORT = optional(  # saved/<name>.json, by training/run.py
    {
        "results": RESULTS,
        "config": optional({"epochs": EPOCHS, "seed": COUNT}, name=maybe(TEXT)),
        "provenance": {"machine": TEXT, "threads": SIZE, "accelerator": maybe(TEXT), "torch": TEXT},
        "metrics": optional(METRICS["val"], **METRICS["train"]),
        "val_seconds": [NOT_NEGATIVE],
    },
    images=TEXT,
    images_but_test=TEXT,
)
STORED_RUN = {  # what is needed to repeat a run
    "results": optional({}, test_accuracy=FRACTION),
    "config": {...: ANYTHING},
}
HISTORY = {  # figures/time_to_accuracy_<contender>_<seed>.json, by studies/benchmark.py
    "provenance": {...: ANYTHING},
    "history": [{"epoch": SIZE, "val_accuracy": FRACTION, "wall_seconds": POSITIVE, "cpu_seconds": POSITIVE}],
}
BENCHMARK_PARTS = {"settings": {...: ANYTHING}, "parts": {...: ANYTHING}}  # figures/benchmark.json.part, by the same
WORKERS = {"hidden_size": SIZE, "processes": SIZE, "threads": SIZE, "images_per_second": POSITIVE, "speedup": POSITIVE}
SCALING = optional(  # figures/scaling.json, by studies/scaling.py
    {"provenance": {...: ANYTHING}},
    throughput=[WORKERS],
    memory={"rows": [{"memory_mb": POSITIVE, "predicted_mb": POSITIVE}]},
)

# -------------------------------------------------------------------------------------------------------- the check


def check(value: Any, table: Any, where: str = "") -> None:
    """
    Raises:
        ValueError: the value is not what the table says; the message names the first place.
    """
    if isinstance(table, Kind):
        if not table.fits(value):
            raise ValueError(f"{where or 'it'} must be {table.what}, not {shorten(value)}")
    elif isinstance(table, list):
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} must be a list, not {shorten(value)}")
        for i, item in enumerate(value):
            check(item, table[0], f"{where}[{i}]")
    else:
        _check_dict(value, table, where)


def _check_dict(value: Any, table: dict, where: str) -> None:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{where or 'it'} must be a table of named values, not {shorten(value)}")
    begin = f"{where}." if where else ""
    for key, kind in table.items():
        if key is OPTIONAL:
            _check_dict(value, {name: more for name, more in kind.items() if name in value}, where)
        elif key is ...:
            for name, item in value.items():
                check(item, kind, f"{begin}{name}")
        elif key not in value:
            raise ValueError(f"{begin}{key} is missing")
        else:
            check(value[key], kind, f"{begin}{key}")


def fits(value: Any, table: Any) -> bool:
    try:
        check(value, table)
    except ValueError:
        return False
    return True


def require_like(value: Any, wanted: Any, where: str) -> None:
    """
    Raises:
        ValueError: the value has other keys, another length, or a tensor of another shape or kind than `wanted`.
    """
    if isinstance(wanted, dict):
        if not isinstance(value, dict) or value.keys() != wanted.keys():
            names = sorted(map(str, value.keys() ^ wanted.keys())) if isinstance(value, dict) else []
            listed = ", ".join(names[:3] + ["..."] * (len(names) > 3))
            raise ValueError(f"{where}: only in one of the two are {listed or 'all parts'}")
        for name, part in wanted.items():
            require_like(value[name], part, f"{where} {name}")
    elif isinstance(wanted, torch.Tensor):
        if not isinstance(value, torch.Tensor) or value.shape != wanted.shape or value.dtype != wanted.dtype:
            raise ValueError(f"{where} must be {shorten(wanted)}, not {shorten(value)}")
    elif isinstance(wanted, float):
        check(value, NUMBER, where)
    elif type(value) is not type(wanted):
        raise ValueError(f"{where} must be {shorten(wanted)}, not {shorten(value)}")


def shorten(value: Any) -> str:
    """A few words that say what a value is."""
    if value is None:
        return "null"
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, dict | list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**20 else "a huge number"
    return text if len(text) <= 60 else text[:57] + "..."
