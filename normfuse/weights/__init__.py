"""Weights as programs: evaluated once, replayed on other checkpoints."""
