"""What a method returned is checked here, whatever its kind, before anything is done with it.

Types, shapes and counts are known to the host and are always checked. Numbers in a tensor are not:
on a GPU, to look at them is to wait for all work before. They are checked (`values`) of methods
that are not shipped, and of all where `patch(..., debug=True)` asks for it.
"""
