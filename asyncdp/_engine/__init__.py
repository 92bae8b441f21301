"""The engine: `data_parallel()`, `DataParallel`, and what chooses its lanes."""
