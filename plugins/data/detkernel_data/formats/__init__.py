"""Readers of annotation formats: from files to a table of what they say."""
