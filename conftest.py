"""Shared by all tests: what is printed is not wrapped, so that a test finds a message in one line."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the terminal were endless; a test of what is wrapped sets its own width."""
    monkeypatch.setenv("COLUMNS", "10000")
