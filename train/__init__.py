"""Recipes, labelled scenes and the training loop."""
