"""Printers that know no model: the terminal and HTML."""
