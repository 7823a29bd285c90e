"""Trains the embedded model: `python -m vlmprune.eval.embedded.training vision|language|export`."""
