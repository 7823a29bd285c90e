"""One file a model family, named after the configuration's `model_type`: what benches, loading and
lmms-eval know of it."""
