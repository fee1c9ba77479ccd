"""Data sets, transforms and the loader, for detkernel."""
