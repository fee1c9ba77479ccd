"""Checkpoints that survive, and exact resume, for detkernel."""
