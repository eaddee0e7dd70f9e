"""Accuracy against labels and equivalence against the checkpoint, measured."""
