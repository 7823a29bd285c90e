"""The bridge to lmms-eval: our model as one of its models, its tasks as benchmarks of a sweep."""
