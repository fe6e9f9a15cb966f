"""Recipe → run: the loop, its checkpoints, its metrics, and validation."""
