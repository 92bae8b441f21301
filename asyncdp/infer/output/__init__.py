"""What a batch-inference job writes: parts, journal, merged file."""
