"""What carries the stages: processes, checkpoints, learning rates and averages, command lines."""
