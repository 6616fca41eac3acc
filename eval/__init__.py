"""Evaluation: how the zoo measures."""
