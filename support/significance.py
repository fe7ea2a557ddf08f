"""How sure is a difference in accuracy?  Paired bootstrap, McNemar's test, Holm's correction, Wilson's interval, and
Student's t over seeds.

`correct` is, for each test image, 1 where the model is right and 0 where it is wrong; of several runs of a model it may
be their mean. Two models are compared on the same images in the same order. Accuracies are fractions.
"""

import warnings

import numpy as np
from scipy.stats import DegenerateDataWarning, bootstrap, ttest_1samp
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

BATCH = 50  # resamples drawn at a time: faster than all at once, which would not fit into a cache


def paired_bootstrap(correct: np.ndarray, other: np.ndarray, resamples: int = 10_000, seed: int = 0) -> dict:
    """The accuracy of one model minus that of the other, and how it varies when the test images are drawn anew.

    Returns:
        `difference`; its 95 % intervals `percentile` and `bca` (bias-corrected and accelerated, Efron 1987), each
        `[low, high]`; and `resampled` `(resamples,)`, the difference on each set of images drawn with replacement.
        Where both models are equally right on every image the intervals have no width. BCa is not defined where too
        few images make a difference: the percentile interval takes its place.

    Raises:
        ValueError: the two are not of the same images, or fewer than two.
    """
    correct, other = np.asarray(correct, float), np.asarray(other, float)
    if correct.shape != other.shape or correct.ndim != 1 or len(correct) < 2:
        raise ValueError(f"a paired comparison needs the same images twice, not {correct.shape} and {other.shape}")
    differences = correct - other
    mean = float(differences.mean())
    if np.ptp(differences) == 0:  # whichever images are drawn, the mean is this; BCa would be 0 / 0
        return {
            "difference": mean,
            "percentile": [mean, mean],
            "bca": [mean, mean],
            "resampled": np.full(resamples, mean),
        }
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", DegenerateDataWarning)
        bca = bootstrap((differences,), np.mean, n_resamples=resamples, batch=BATCH, method="BCa", rng=seed)
    percentile = bootstrap((differences,), np.mean, n_resamples=0, bootstrap_result=bca, method="percentile")
    intervals = {"percentile": percentile.confidence_interval, "bca": bca.confidence_interval}
    if not np.isfinite(intervals["bca"]).all():
        intervals["bca"] = intervals["percentile"]
    ends = {name: [float(end) for end in interval] for name, interval in intervals.items()}
    return {"difference": mean, **ends, "resampled": bca.bootstrap_distribution}


def mcnemar_p(correct: np.ndarray, other: np.ndarray) -> float:
    """Exact p value of McNemar's test (1947): of the images on which just one of two models is right, each has half.

    Args:
        correct, other: 0 and 1 or booleans: of one run each.
    """
    correct, other = np.asarray(correct, bool), np.asarray(other, bool)
    table = [[(correct & other).sum(), (correct & ~other).sum()], [(~correct & other).sum(), (~correct & ~other).sum()]]
    return float(mcnemar(table, exact=True).pvalue)


def paired_t(values: list[float], others: list[float]) -> dict:
    """The mean difference of two models' accuracies seed by seed, and what it may be with other seeds; or of any two
    figures that were measured in pairs.

    Returns:
        `difference`, its 95 % interval `[low, high]` and the p value of Student's paired t test (1908), which takes the
        differences for normally distributed; without interval and p (None) where there are fewer than two.
    """
    differences = np.subtract(values, others)
    mean = float(differences.mean())
    if len(differences) < 2:
        return {"difference": mean, "interval": None, "p": None}
    if np.ptp(differences) < 1e-12:
        return {"difference": mean, "interval": [mean, mean], "p": float(abs(mean) < 1e-12)}
    found = ttest_1samp(differences, 0)
    interval = [float(end) for end in found.confidence_interval()]
    return {"difference": mean, "interval": interval, "p": float(found.pvalue)}


def holm(p_values: list[float]) -> list[float]:
    """p values corrected for there being several (Holm 1979): the chance of one false alarm or more stays below 5 %
    where those below 0.05 are called differences."""
    return multipletests(p_values, method="holm")[1].tolist() if p_values else []


def verdict(interval: list[float], p: float) -> str:
    """What a difference is called: "above" or "below" where its 95 % interval leaves out 0 and its p value, corrected
    where there are several, is below 0.05; else "cannot be told apart from"."""
    low, high = interval
    if low <= 0 <= high or p >= 0.05:
        return "cannot be told apart from"
    return "above" if low > 0 else "below"


def points(difference: float, digits: int = 1) -> str:
    """A difference of fractions in percentage points, "-0.7"; with one more digit where it would else be 0."""
    digits += 0 < abs(difference) < 0.5 * 10 ** (-2 - digits)
    return f"{round(100 * difference, 6):+.{digits}f}"  # ties alike, whatever the last bits of a difference are


def interval_text(ends: list[float], digits: int = 1) -> str:
    """An interval of a difference of fractions, in percentage points: "-1.3 to +0.4"."""
    return f"{points(ends[0], digits)} to {points(ends[1], digits)}"


def wilson(accuracy: float, images: int) -> list[float]:
    """95 % interval `[low, high]` of an accuracy on that many test images (Wilson 1927): what other images of the same
    kind might have given. It says nothing about other seeds."""
    return [float(end) for end in proportion_confint(accuracy * images, images, method="wilson")]
