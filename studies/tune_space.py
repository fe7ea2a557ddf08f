"""What tuning searches: a table for each architecture, and the flags to train.py that a choice from it means.

A name is a hyperparameter of train.py. One that ends in `_times` is multiplied with what the optimiser and the data set
have by default, so that one range serves all of them: `lr_times` 2 is `--lr 0.012` with Muon, `--lr 0.004` with AdamW.
"""

import shlex

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

import train
from support import cli

Space = dict[str, BaseDistribution]

COMMON: Space = {
    "lr_times": FloatDistribution(0.25, 4, log=True),
    "weight_decay_times": FloatDistribution(0.1, 10, log=True),
    "momentum": FloatDistribution(0.8, 0.98),
    "label_smoothing": FloatDistribution(0, 0.2),
    "warmup": FloatDistribution(0.02, 0.4),
    "batch_size_times": CategoricalDistribution([0.5, 1.0, 2.0]),
}
SPACES: dict[str, Space] = {
    # at most 205,642 parameters: as many as the default, with which it is compared
    "vit": {
        **COMMON,
        "lr_times": FloatDistribution(0.4, 2.5, log=True),  # Muon alone, whose rate is known better
        "drop_path": FloatDistribution(0, 0.1),
        "num_heads": CategoricalDistribution([2, 4, 8]),
        "mlp_ratio": CategoricalDistribution([2.0, 3.0, 4.0]),
        # not `none`: it is as good in few epochs, and 5 points worse in twenty (docs/recipe.md)
        "augment": CategoricalDistribution(["crop_flip", "random_erasing"]),
    },
    "cnn": {
        **COMMON,
        "optimizer": CategoricalDistribution(["muon", "adamw", "sgd"]),
        "augment": CategoricalDistribution(["none", "crop_flip", "random_erasing"]),
    },
}


def usual(common: str, params: dict) -> train.Config:
    """train.py's config with these common flags and the optimiser of these choices, all else as by default."""
    flags = shlex.split(common) + (["--optimizer", params["optimizer"]] if "optimizer" in params else [])
    return cli.parse(train.Config, flags, train.dependent_defaults, remember=False)


def default_params(space: Space, common: str) -> dict:
    """The choices that are train.py's defaults."""
    config = usual(common, {})
    return {name: 1.0 if name.endswith("_times") else getattr(config, name) for name in space}


def flags_of(params: dict, common: str) -> str:
    """The flags that choices mean, each number with three digits."""
    config, flags = usual(common, params), []
    for name, value in params.items():
        plain = name.removesuffix("_times")
        default = getattr(config, plain)
        value = value * default if plain != name else value
        value = round(value) if type(default) is int else float(f"{value:.3g}") if type(default) is float else value
        flags += [f"--{plain}", str(value)]
    return shlex.join(flags)
