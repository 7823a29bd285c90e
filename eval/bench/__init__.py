"""`vlmprune bench`: how fast a patched model is, and how fast it could be."""
