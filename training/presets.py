"""Presets: `python train.py --preset NAME` puts these in the place of train.py's defaults; flags go before both."""

PRESETS = {
    "default": {},
    # above 60 % after part of an epoch
    "quick": {
        "epochs": 0.5,
        "tokenizer": "whitened",
        "patch_size": 8,
        "num_blocks": 1,
        "mlp_ratio": 2.0,
        "batch_size": 64,
        "lr": 1e-2,
        "weight_decay": 0.1,
        "label_smoothing": 0.0,
    },
    # a deep convolutional tokenizer down to 4x4 tokens and one wide block; 2.5 million parameters
    "accurate": {
        "epochs": 15,
        "tokenizer": "whitened",
        "tokenizer_depth": 3,
        "patch_size": 8,
        "hidden_size": 256,
        "num_heads": 8,
        "num_blocks": 1,
        "mlp_ratio": 2.0,
        "batch_size": 256,
        "lr": 9e-3,
        "weight_decay": 0.15,
        "momentum": 0.8,
    },
    # such a tokenizer with fewer than 300,000 parameters in all, and long enough to make up for it
    "small": {
        "epochs": 90,
        "augment": "random_erasing",
        "tokenizer": "whitened",
        "tokenizer_depth": 2,
        "patch_size": 8,
        "hidden_size": 104,
        "num_heads": 4,
        "num_blocks": 1,
        "mlp_ratio": 1.0,
        "lr": 6e-3,
        "weight_decay": 0.1,
        "momentum": 0.9,
    },
}
# accurate's model on the validation images as well, which then cannot choose anything, and for twice as long
PRESETS["best"] = {**PRESETS["accurate"], "epochs": 30, "val_fraction": 0.0, "augment": "random_erasing"}
