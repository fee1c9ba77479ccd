"""Optimizer stepping, schedules, precision and averaging, for detkernel."""
