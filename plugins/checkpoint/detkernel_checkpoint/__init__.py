"""Checkpoints that survive torn writes and full disks, and a resume that is exact bit for bit."""
