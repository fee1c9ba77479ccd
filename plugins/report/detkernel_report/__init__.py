"""Pictures of predictions, for detkernel."""
