"""Object detection: networks, data, methods and metrics of one task."""
