"""Capture: from what the user gave to the canonical graph."""
