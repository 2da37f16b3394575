"""What the stages are built on: settings, the run's folder, processes, checkpoints, command lines."""
