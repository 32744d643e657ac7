"""Images with boxes: sources, views, loading, batches."""
