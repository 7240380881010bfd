"""A graph on values, in float64."""
