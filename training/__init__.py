"""What hangs on a training run: callbacks, checkpoints, optimisers, models by name, several processes."""
