"""Writing what teachers say: ``python -m kd_hf.cache RECIPE``."""

SHARD_ROWS, TOP_K, VERIFIED = 100_000, 100, 64  # rows of a file, classes kept of an image, images that are compared
