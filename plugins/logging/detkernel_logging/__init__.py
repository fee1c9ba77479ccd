"""Console, text, JSON lines and TensorBoard logs, for detkernel."""
