"""Objectives: one method a file."""
