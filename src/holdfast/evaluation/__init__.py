"""Evaluation: accuracies that can be defended."""
