"""Lowering: printing a program for a target."""
