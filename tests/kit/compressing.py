"""Methods that remove entries of the KV cache, with fields for all their ways."""

PRESSES = ("snapkv", "knorm", "received")
COMPRESSING = [
    ("elastic_cache", {}),
    ("elastic_cache", {"start_size": 0}),
    ("elastic_cache", {"start_size": 6}),
    ("elastic_cache", {"start_size": 2}),
    *(("visual_press", {"press": press}) for press in PRESSES),
    ("visual_press", {"pooling": "max", "kernel": 7, "window": 3}),
]
