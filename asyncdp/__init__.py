"""Data-parallel PyTorch on asynchronous lanes."""
