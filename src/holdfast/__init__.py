"""Holdfast: train image classifiers that hold under attack, and measure honestly how well they hold."""

__version__ = "0.1.0"
