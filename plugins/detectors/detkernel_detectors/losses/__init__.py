"""Losses of classes, boxes and distributions."""
