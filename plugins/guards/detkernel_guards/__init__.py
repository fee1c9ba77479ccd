"""Guards: invalid losses, class counts, signals and time limits, for detkernel."""
