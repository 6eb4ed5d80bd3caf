"""Shortlist, offline: data, models, training, evaluation and the model registry."""
