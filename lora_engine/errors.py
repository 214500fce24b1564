"""Errors of the engine's own."""

from __future__ import annotations


class FormatError(ValueError):
    """A file is not what its format says; the message names file and key."""
