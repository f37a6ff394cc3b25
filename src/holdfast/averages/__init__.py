"""Averages of the weights: one a file."""
