"""What the runs of the study say: a row for each model, its difference from the CNN, and the answers in words.

Accuracies are fractions, differences are the model's accuracy minus the CNN's under the same recipe. Two kinds of
chance are kept apart. Intervals and p values are about the test images: what others of their kind would have given.
Standard deviations over seeds are about training: what another run would have given.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from tqdm import tqdm

from studies.runs import markdown
from support.significance import holm, mcnemar_p, paired_bootstrap, wilson

REFERENCE = "cnn"  # what all others are compared with
EARLIER = {  # test accuracy on CIFAR-10 that earlier code of this kind reported after 20 epochs
    "cnn": 0.670,
    "vit_patch2": 0.631,
    "vit_patch4": 0.601,
    "vit_patch6": 0.566,
    "vit_patch8": 0.553,
}


@dataclass
class Run:
    """A trained model and what it said of each test image, all in the order of the test set."""

    recipe: str
    model: str  # a key of compare.MODELS
    title: str
    seed: int
    report: dict  # that train.py wrote
    correct: np.ndarray  # booleans `(images,)`
    labels: np.ndarray  # the right classes `(images,)`
    classes: np.ndarray  # their names
    flops: int  # of a forward pass for one image

    def accuracy_after(self, seconds: float) -> float:
        """Validation accuracy after that much training, on a straight line between epochs; nan before the first."""
        times, accuracies = self.report["val_seconds"], self.report["metrics"]["val_accuracy"]
        return float(np.interp(seconds, times, accuracies, left=np.nan))


def group(runs: list[Run]) -> dict[tuple[str, str], list[Run]]:
    """The runs of each (recipe, model), which differ in their seed alone; in the order given."""
    groups = {}
    for run in runs:
        groups.setdefault((run.recipe, run.model), []).append(run)
    return groups


def mean_correct(runs: list[Run]) -> np.ndarray:
    """For each test image the part of the runs that are right, `(images,)`."""
    return np.mean([run.correct for run in runs], axis=0)


def deviation(values: list[float]) -> float | None:
    """Standard deviation of the sample; None of a single value."""
    return pd.Series(values).std() if len(values) > 1 else None


def summarise(runs: list[Run], rows: list[tuple[str, str, str]], epochs: int) -> dict:
    """Everything that the tables and figures show, as plain values but for `differences[i]["resampled"]`.

    Args:
        rows: recipe, model and title of all that belongs to the study; those without a run are named in `missing`.
        epochs: that every run was trained for.
    """
    groups = group(runs)
    study = {
        "epochs": epochs,
        "images": len(runs[0].correct),
        "missing": [f"{title}, {recipe}" for recipe, model, title in rows if (recipe, model) not in groups],
        "rows": [summarise_model(members) for members in groups.values()],
        "differences": compare_with_reference(groups),
        "machines": sorted({machine(run) for run in runs}),
    }
    return {**study, "answers": answers(study)}


def machine(run: Run) -> str:
    provenance = run.report["provenance"]
    where = provenance["accelerator"] or f"{provenance['threads']} thread(s) of the CPU"
    return f"{provenance['machine']}, {where}, torch {provenance['torch']}"


def summarise_model(runs: list[Run]) -> dict:
    """A row of the table: means over the runs of one model under one recipe."""
    accuracies = [float(run.correct.mean()) for run in runs]
    accuracy = float(np.mean(accuracies))
    results = pd.DataFrame([run.report["results"] for run in runs])
    means = results[["training_seconds", "val_accuracy", "test_loss"]].mean().to_dict()
    return {
        "recipe": runs[0].recipe,
        "model": runs[0].model,
        "title": runs[0].title,
        "seeds": [run.seed for run in runs],
        "parameters": runs[0].report["results"]["parameters"],
        "flops": int(runs[0].flops),
        **means,
        "test_accuracy": accuracy,
        "interval": wilson(accuracy, len(runs[0].correct)),
        "test_accuracies": accuracies,
        "seed_deviation": deviation(accuracies),
    }


# ------------------------------------------------------------------------------------------------- against the CNN


def compare_with_reference(groups: dict[tuple[str, str], list[Run]]) -> list[dict]:
    """Every model against the CNN of its recipe, where there is one.

    With several runs the paired bootstrap is of their means, image by image. McNemar's test knows only right and wrong:
    it is made of each pair of runs, first with first and so on, and the largest p value counts. Holm's correction is
    over all models and recipes together.
    """
    pairs = [
        (members, groups[recipe, REFERENCE])
        for (recipe, model), members in groups.items()
        if model != REFERENCE and (recipe, REFERENCE) in groups
    ]
    rows = []
    for runs, reference in tqdm(pairs, "resampling", unit="model", leave=False):
        right, reference_right = mean_correct(runs), mean_correct(reference)
        matched = list(zip(runs, reference, strict=False))
        by_seed = [float(run.correct.mean() - other.correct.mean()) for run, other in matched]
        p_values = [mcnemar_p(run.correct, other.correct) for run, other in matched]
        rows.append(
            {
                "recipe": runs[0].recipe,
                "model": runs[0].model,
                "title": runs[0].title,
                **paired_bootstrap(right, reference_right),
                "by_seed": by_seed,
                "seed_deviation": deviation(by_seed),
                "mcnemar_p": p_values,
                "p": max(p_values),
                "parameter_ratio": runs[0].report["results"]["parameters"]
                / reference[0].report["results"]["parameters"],
                "equal_time": at_equal_time(runs, reference),
                # of each class, the part of its images that one gets and the other does not
                "only_model": by_class(runs[0], right * (1 - reference_right)),
                "only_reference": by_class(runs[0], reference_right * (1 - right)),
            }
        )
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = p
    return rows


def at_equal_time(runs: list[Run], reference: list[Run]) -> dict:
    """Validation accuracies of both when the one that is the first to end its training has ended it: of that one the
    last. None where the other has not been validated yet."""

    def end(members: list[Run]) -> float:
        return float(np.mean([run.report["val_seconds"][-1] for run in members]))

    first = min(runs, reference, key=end)
    result = {"seconds": end(first)}
    for name, members in (("accuracy", runs), ("reference_accuracy", reference)):
        time = np.inf if members is first else result["seconds"]
        accuracy = float(np.mean([run.accuracy_after(time) for run in members]))
        result[name] = None if np.isnan(accuracy) else accuracy
    return result


def by_class(run: Run, values: np.ndarray) -> dict[str, float]:
    """The mean of `values` `(images,)` over the images of each class."""
    return {str(name): float(values[run.labels == i].mean()) for i, name in enumerate(run.classes)}


# ------------------------------------------------------------------------------------------------------ in words


def answers(study: dict) -> list[str]:
    """Does a CNN beat a ViT trained from scratch, and does the recipe turn that round?  Sentences in Markdown."""
    sentences = []
    for recipe in dict.fromkeys(row["recipe"] for row in study["differences"]):
        rows = [row for row in study["differences"] if row["recipe"] == recipe]
        phrases = []
        for verdict in ("above the CNN", "below the CNN", CANNOT_TELL):
            names = [f"{row['title']} ({points(row['difference'])})" for row in rows if judge(row) == verdict]
            phrases += [f"{verdict}: {', '.join(names)}"] if names else []
        sentences.append(f"**Equal epochs ({study['epochs']}), {recipe}:** {'; '.join(phrases)}.")
        phrases = []
        for row in rows:
            then = row["equal_time"]
            if None in then.values():
                difference = "(no epoch of the slower one done)"
            else:
                difference = points(then["accuracy"] - then["reference_accuracy"])
            phrases.append(f"{row['title']} {difference} at {clock(then['seconds'])}")
        sentences.append(
            f"**Equal training time, {recipe}:** validation accuracy minus the CNN's, when the quicker of the two had "
            f"ended its training: {', '.join(phrases)}."
        )
        for row in rows:
            if abs(row["parameter_ratio"] - 1) < 0.1:
                sentences.append(
                    f"**Equal parameters, {recipe}:** {row['title']}, with {row['parameter_ratio']:.2f} times the "
                    f"CNN's parameters: {judge(row)} ({points(row['difference'])}, {interval(row['bca'])})."
                )
    verdicts = {(row["recipe"], row["model"]): row for row in study["differences"]}
    turned = []
    for (recipe, model), row in verdicts.items():
        if recipe == "plain" and model.startswith("vit") and ("default", model) in verdicts:
            after = verdicts["default", model]
            answer = "yes" if (judge(row), judge(after)) == ("below the CNN", "above the CNN") else "no"
            turned.append(f"{row['title']} {points(row['difference'])} and {points(after['difference'])}, {answer}")
    if turned:
        sentences.append(
            f"**Does the recipe turn it round?** Minus the CNN's, plain and default: {'; '.join(turned)}. The two "
            "recipes differ in more than augmentation: in optimiser, schedule, label smoothing, weight decay and "
            "pooling too."
        )
    return sentences


CANNOT_TELL = "cannot be told apart from the CNN"


def judge(row: dict) -> str:
    """Above or below the CNN where Holm's p value is below 0.05."""
    if row["p_holm"] >= 0.05:
        return CANNOT_TELL
    return "above the CNN" if row["difference"] > 0 else "below the CNN"


def points(difference: float) -> str:
    return f"{100 * difference:+.1f}"


def interval(ends: list[float]) -> str:
    return f"{points(ends[0])} to {points(ends[1])}"


def clock(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


# ------------------------------------------------------------------------------------------------------- tables


def as_markdown(study: dict, dataset: str) -> str:
    """The table, the differences from the CNN, the answers, and how to read them."""
    known = dataset == "CIFAR-10"
    lines = [f"### {dataset}, {study['epochs']} epochs, {study['images']:,} test images", ""]
    lines.append(markdown([row_of_accuracy(row, known) for row in study["rows"]]))
    if study["differences"]:
        lines += ["", "Test accuracy minus that of the CNN under the same recipe, in percentage points:", ""]
        lines.append(markdown([row_of_difference(row) for row in study["differences"]]))
    lines += ["", *(f"* {sentence}" for sentence in study["answers"])]
    if study["missing"]:
        lines.append(f"* **Missing:** {'; '.join(study['missing'])}.")
    earlier = " Earlier code's ViTs had 3 heads and 10 blocks; here all but the small one have 4 and 4." * known
    return "\n".join([*lines, "", HOW_TO_READ + "; ".join(study["machines"]) + "." + earlier])


HOW_TO_READ = (
    "Means over seeds. Intervals (Wilson's of an accuracy, the paired bootstrap's of a difference, 10,000 resamples) "
    "and p values say what other test images would have given; SD over seeds, what another run would. McNemar's test "
    "is exact, seed by seed, and the largest p counts, which errs on the side of no difference; Holm's correction is over "
    "all rows. At equal training time the slower model is in the middle of its run: planned for that time, with a "
    "schedule that has cooled down by then, it would do better. FLOPs of a forward pass, a multiplication and an "
    "addition counted as two. Training seconds without validation, on "
)


def row_of_accuracy(row: dict, known: bool) -> dict[str, str]:
    seconds = row["training_seconds"]
    return {
        "model": row["title"],
        "recipe": row["recipe"],
        "seeds": str(len(row["seeds"])),
        "parameters": f"{row['parameters']:,}",
        "MFLOPs per image": f"{row['flops'] / 1e6:.1f}",
        "training, s": f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.1f}",
        "test loss": f"{row['test_loss']:.3f}",
        "test accuracy": f"**{100 * row['test_accuracy']:.1f} %**",
        "95 % interval": " to ".join(f"{100 * end:.1f}" for end in row["interval"]),
        "SD over seeds": percent_or_nothing(row["seed_deviation"], 2),
        **({"earlier code": percent_or_nothing(EARLIER.get(row["model"]))} if known else {}),
    }


def row_of_difference(row: dict) -> dict[str, str]:
    return {
        "model": row["title"],
        "recipe": row["recipe"],
        "difference": f"**{points(row['difference'])}**",
        "95 %, percentile": interval(row["percentile"]),
        "95 %, BCa": interval(row["bca"]),
        "SD over seeds": percent_or_nothing(row["seed_deviation"], 2),
        "McNemar's p": p_text(row["p"]),
        "Holm's p": p_text(row["p_holm"]),
    }


def percent_or_nothing(fraction: float | None, digits: int = 1) -> str:
    return "" if fraction is None else f"{100 * fraction:.{digits}f}"
