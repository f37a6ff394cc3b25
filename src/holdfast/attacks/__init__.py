"""Attacks: one a file."""
