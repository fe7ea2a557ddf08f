"""What the runs of the study say: a row for each model, its difference from the CNN, and the answers in words.

Accuracies are fractions, differences are the model's accuracy minus the CNN's under the same recipe. Two kinds of
chance are kept apart. Intervals and p values are about the test images: what others of their kind would have given.
Standard deviations over seeds are about training: what another run would have given.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from studies.runs import markdown
from support import cli
from support.report import machine_of
from support.significance import holm, interval_text, mcnemar_p, paired_bootstrap, paired_t, points, verdict, wilson

REFERENCE = "cnn"  # what all others are compared with
# a ViT, and the CNN that has about as many parameters
EQUAL_PARAMETERS = (("vit_small", "cnn"), ("vit_patch4", "resnet20"), ("vit_wide", "resnet20"))
EARLIER = {  # test accuracy on CIFAR-10 that earlier code of this kind reported after 20 epochs
    "cnn": 0.670,
    "vit_patch2": 0.631,
    "vit_patch4": 0.601,
    "vit_patch6": 0.566,
    "vit_patch8": 0.553,
}
NOTE = (
    "Means over seeds. Intervals (Wilson's of an accuracy, the paired bootstrap's of a difference, 10,000 resamples) "
    "and p values say what other test images would have given; SD over seeds, what another run would. McNemar's test "
    "is exact, seed by seed, and the largest p counts, or 1 where the seeds disagree about which model is better: this "
    "errs on the side of no difference. Holm's correction is over all rows. At equal training time the slower model "
    "is in the middle of its run: planned for that time, with a schedule that has cooled down by then, it would do "
    "better. FLOPs are those of a forward pass, a multiplication and an addition counted as two. Training seconds are "
    "without validation, on "
)


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

    def stored(self) -> dict:
        """As it is stored with the study: its report without the training metrics, and the right answers as 0/1."""
        metrics = {name: values for name, values in self.report["metrics"].items() if name.startswith("val_")}
        correct = "".join(map(str, self.correct.astype(int)))
        return {**self.report, "metrics": metrics, "recipe": self.recipe, "name": self.title, "correct": correct}


Groups = dict[tuple[str, str], list[Run]]  # (recipe, model) -> its runs, which differ in their seed alone


def group(runs: list[Run]) -> Groups:
    """The runs, which are in order of recipe and model."""
    return {key: list(members) for key, members in itertools.groupby(runs, lambda run: (run.recipe, run.model))}


def deviation(values: list[float]) -> float | None:
    """Standard deviation of the sample; None of a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def summarise(runs: list[Run], titles: dict[tuple[str, str], str], epochs: int) -> dict:
    """Everything that the tables and figures show, as plain values but for `differences[i]["resampled"]`.

    Args:
        titles: of all that belongs to the study, by recipe and model; what has no run is named in `missing`.
        epochs: that every run was trained for.
    """
    groups = group(runs)
    study = {
        "epochs": epochs,
        "images": len(runs[0].correct),
        "missing": [f"{title}, {key[0]}" for key, title in titles.items() if key not in groups],
        "rows": [summarise_model(members) for members in groups.values()],
        "differences": compare_with_reference(groups),
        "equal_parameters": compare_at_equal_parameters(groups),
        "smaller_patches": compare_patches(groups),
        "machines": sorted({machine_of(run.report["provenance"]) for run in runs}),
    }
    return {**study, "answers": answers(study)}


def summarise_model(runs: list[Run]) -> dict:
    """A row of the table: means over the runs of one model under one recipe."""
    accuracies = [float(run.correct.mean()) for run in runs]
    results = [run.report["results"] for run in runs]
    return {
        "recipe": runs[0].recipe,
        "model": runs[0].model,
        "title": runs[0].title,
        "seeds": [run.seed for run in runs],
        "parameters": runs[0].report["results"]["parameters"],
        "flops": int(runs[0].flops),
        **{
            name: float(np.mean([result[name] for result in results]))
            for name in ("training_seconds", "val_accuracy", "test_loss")
        },
        "test_accuracy": float(np.mean(accuracies)),
        "interval": wilson(np.mean(accuracies), len(runs[0].correct)),
        "test_accuracies": accuracies,
        "seed_deviation": deviation(accuracies),
    }


# ------------------------------------------------------------------------------------------------- against the CNN


def compare_with_reference(groups: Groups) -> list[dict]:
    """Every model against the CNN of its recipe, where there is one; Holm's correction is over all of them."""
    pairs = [
        (members, groups[recipe, REFERENCE])
        for (recipe, model), members in groups.items()
        if model != REFERENCE and (recipe, REFERENCE) in groups
    ]
    rows = [compare(*pair) for pair in cli.progress(pairs, "resampling", "model")]
    corrected = holm([row["p"] for row in rows])
    return [{**row, "p_holm": p} for row, p in zip(rows, corrected, strict=True)]


def compare_at_equal_parameters(groups: Groups) -> list[dict]:
    """ViTs against CNNs of about their size. `t` is the interval over seeds of the differences seed by seed."""
    kept = ("recipe", "title", "difference", "percentile", "bca", "by_seed", "seed_deviation", "parameter_ratio")
    found = []
    for recipe in dict.fromkeys(recipe for recipe, _ in groups):
        for model, cnn in EQUAL_PARAMETERS:
            if (recipe, model) in groups and (recipe, cnn) in groups:
                row = compare(groups[recipe, model], groups[recipe, cnn])
                over_seeds = paired_t(row["by_seed"], [0.0] * len(row["by_seed"]))["interval"]
                other = {"reference": groups[recipe, cnn][0].title, "t": over_seeds}
                found.append({**{name: row[name] for name in kept}, **other})
    return found


def compare_patches(groups: Groups) -> list[dict]:
    """Patches of 2 pixels against patches of 4, under each recipe that has both."""
    kept = ("recipe", "difference", "bca", "seeds", "by_seed", "p")
    recipes = dict.fromkeys(recipe for recipe, _ in groups)
    pairs = [(groups.get((recipe, "vit_patch2")), groups.get((recipe, "vit_patch4"))) for recipe in recipes]
    rows = [compare(*pair) for pair in pairs if all(pair)]
    return [{name: row[name] for name in kept} for row in rows]


def compare(runs: list[Run], reference: list[Run]) -> dict:
    """One model against another, the CNN say.

    Seeds that only one of them has are left out. With several runs the paired bootstrap is of their means, image by
    image. McNemar's test knows only right and wrong: it is made of each pair of runs with the same seed, and the
    largest p value counts; where the seeds disagree about which model is better, p is 1.

    Raises:
        ValueError: no two runs have the same seed.
    """
    others = {run.seed: run for run in reference}
    matched = [(run, others[run.seed]) for run in runs if run.seed in others]
    if not matched:
        raise ValueError(f"no run of {runs[0].title} has the seed of a run of {reference[0].title}: train both so")
    runs, reference = zip(*matched, strict=True)
    right, reference_right = (np.mean([run.correct for run in members], axis=0) for members in (runs, reference))
    by_seed = [float(run.correct.mean() - other.correct.mean()) for run, other in matched]
    p_values = [mcnemar_p(run.correct, other.correct) for run, other in matched]
    agreed = min(by_seed) > 0 or max(by_seed) < 0
    parameters, reference_parameters = (members[0].report["results"]["parameters"] for members in (runs, reference))
    return {
        "recipe": runs[0].recipe,
        "model": runs[0].model,
        "title": runs[0].title,
        **paired_bootstrap(right, reference_right),
        "seeds": [run.seed for run in runs],
        "by_seed": by_seed,
        "seed_deviation": deviation(by_seed),
        "mcnemar_p": p_values,
        "p": max(p_values) if agreed else 1.0,
        "parameter_ratio": parameters / reference_parameters,
        "equal_time": at_equal_time(runs, reference),
        # of each class, the part of its images that one gets and the other does not
        "only_model": by_class(runs[0], right * (1 - reference_right)),
        "only_reference": by_class(runs[0], reference_right * (1 - right)),
    }


def at_equal_time(runs: list[Run], reference: list[Run]) -> dict:
    """Validation accuracies of both when the quicker one has ended its training: of that one the last. None where the
    other has not been validated yet."""

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
    """The mean of `values` `(images,)` over the images of each class; 0 where there are none."""
    members = [run.labels == i for i in range(len(run.classes))]
    return {
        str(name): float(values[m].mean()) if m.any() else 0.0 for name, m in zip(run.classes, members, strict=True)
    }


# ------------------------------------------------------------------------------------------------------ in words


def answers(study: dict) -> list[str]:
    """Does a CNN beat a ViT trained from scratch, and does the recipe turn that round?  Sentences in Markdown."""
    sentences, differences, pairs = [], study["differences"], study["equal_parameters"]
    for recipe in dict.fromkeys(row["recipe"] for row in [*differences, *pairs]):
        rows = [row for row in differences if row["recipe"] == recipe]
        verdicts = {}
        for row in sorted(rows, key=lambda row: VERDICTS.index(judge(row))):
            verdicts.setdefault(judge(row), []).append(f"{row['title']} ({points(row['difference'])})")
        phrases = [f"{verdict} the CNN: {', '.join(names)}" for verdict, names in verdicts.items()]
        if rows:
            sentences.append(f"**Equal epochs ({study['epochs']}), {recipe}:** {'; '.join(phrases)}.")
            sentences.append(
                f"**Equal training time, {recipe}:** validation accuracy minus the CNN's when the quicker of the two "
                f"had ended its training: {', '.join(equal_time(row) for row in rows)}."
            )
        sentences += [at_equal_parameters(row) for row in pairs if row["recipe"] == recipe]
    by_key = {(row["recipe"], row["model"]): row for row in differences}
    turned = []
    for (recipe, model), row in by_key.items():
        after = by_key.get(("default", model))
        if recipe == "plain" and model.startswith("vit") and after:
            answer = "yes" if (judge(row), judge(after)) == ("below", "above") else "no"
            turned.append(f"{row['title']} {points(row['difference'])} and {points(after['difference'])}, {answer}")
    if turned:
        sentences.append(
            f"**Does the recipe turn it round?** Minus the CNN's accuracy, plain and default: {'; '.join(turned)}. The "
            "two recipes differ in more than augmentation: in optimiser, rate, schedule, label smoothing, weight "
            "decay, pooling, first filters and precision too."
        )
    return sentences


VERDICTS = ("above", "below", "cannot be told apart from")


def judge(row: dict) -> str:
    """Above or below the CNN, or not to be told apart from it, by interval and Holm's p value."""
    return verdict(row["bca"], row["p_holm"])


def judge_twice(row: dict) -> str:
    """The same of ViTs and CNNs of about their size: by both intervals, over test images and over seeds."""
    lows, highs = zip(row["bca"], row["t"] or row["bca"], strict=True)
    return verdict([min(lows), max(highs)], p=0.0)


def at_equal_parameters(row: dict) -> str:
    """What `compare_at_equal_parameters` found, in words."""
    reference = "the CNN" if row["reference"] == "CNN" else row["reference"]
    word, ratio = judge_twice(row), row["parameter_ratio"]
    kind = "Equal" if abs(ratio - 1) < 0.1 else "Fewer" if ratio < 1 else "More"
    seeds = f"{interval_text(row['t'])} over seeds" if row["t"] else "one run: other seeds are not known"
    return (
        f"**{kind} parameters, {row['recipe']}:** {row['title']}, with {ratio:.2f} times {reference}'s "
        f"parameters: {word} {reference} ({points(row['difference'])}; 95 % intervals: {interval_text(row['bca'])} "
        f"over test images, {seeds})."
    )


def equal_time(row: dict) -> str:
    """What `at_equal_time` found, in words."""
    seconds, accuracy, reference = row["equal_time"].values()
    unknown = accuracy is None or reference is None
    difference = "(no epoch of the slower one done)" if unknown else points(accuracy - reference)
    clock = f"{seconds:.1f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
    return f"{row['title']} {difference} at {clock}"


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def percent(fraction: float | None, digits: int = 1) -> str:
    return "" if fraction is None else f"{100 * fraction:.{digits}f}"


# ------------------------------------------------------------------------------------------------------- tables


def as_markdown(study: dict, dataset: str) -> str:
    """The table, the differences from the CNN, the answers, and how to read them."""
    known = dataset == "CIFAR-10"
    rows = [
        {
            "model": row["title"],
            "recipe": row["recipe"],
            "seeds": str(len(row["seeds"])),
            "parameters": f"{row['parameters']:,}",
            "MFLOPs per image": f"{row['flops'] / 1e6:.1f}",
            "training, s": f"{row['training_seconds']:,.{0 if row['training_seconds'] >= 10 else 1}f}",
            "test loss": f"{row['test_loss']:.3f}",
            "test accuracy": f"**{percent(row['test_accuracy'])} %**",
            "95 % interval": " to ".join(map(percent, row["interval"])),
            "SD over seeds": percent(row["seed_deviation"], 2),
            **({"earlier code": percent(EARLIER.get(row["model"]))} if known else {}),
        }
        for row in study["rows"]
    ]
    differences = [
        {
            "model": row["title"],
            "recipe": row["recipe"],
            "difference": f"**{points(row['difference'])}**",
            "95 %, percentile": interval_text(row["percentile"]),
            "95 %, BCa": interval_text(row["bca"]),
            "SD over seeds": percent(row["seed_deviation"], 2),
            "McNemar's p": p_text(row["p"]),
            "Holm's p": p_text(row["p_holm"]),
        }
        for row in study["differences"]
    ]
    parts = [f"### {dataset}, {study['epochs']} epochs, {study['images']:,} test images", markdown(rows)]
    if differences:
        parts += ["Test accuracy minus the CNN's under the same recipe, in percentage points:", markdown(differences)]
    missing = [f"**Missing:** {'; '.join(study['missing'])}: `{study['missing_command']}`"] if study["missing"] else []
    parts.append("\n".join(f"* {sentence}" for sentence in study["answers"] + missing))
    earlier = " Earlier code's ViTs had 3 heads and 10 blocks; here all but the small one have 4 and 4."
    parts.append(NOTE + "; ".join(study["machines"]) + "." + earlier * known)
    return "\n\n".join(part for part in parts if part)
