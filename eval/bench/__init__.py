"""`vlmprune bench`: how fast a patched model is, and how fast it could be."""

from .subject import Subject as Subject  # the scaling bench, for now
