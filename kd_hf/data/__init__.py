"""From stored bytes to batches: sources, order, views, mixing, loading."""
