"""Images of predictions, for detkernel."""
