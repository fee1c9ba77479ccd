"""Devices, seeds and many processes, for detkernel."""
