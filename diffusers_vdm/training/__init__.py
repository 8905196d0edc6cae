"""What a training run consists of: keyed batches, averages, checkpoints, metrics, stopping, sharding."""
