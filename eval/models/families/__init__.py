"""One file a model family, named after the configuration's `model_type`: what benches, loading and
lmms-eval know of it."""

BY_SIZES = "llava"
"""The family whose models the bench makes of any width, depth and number of visual tokens."""
