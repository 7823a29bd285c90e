"""`vlmprune tune`: which method and budget for a model, its questions and a target."""
