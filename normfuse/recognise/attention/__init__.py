"""Attention, however it is written, as one operator."""
