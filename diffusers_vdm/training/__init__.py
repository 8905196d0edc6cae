"""Parts of a training run: keyed batches, weight averages, checkpoints, metrics, stopping and sharding."""
