"""Models of a batch-inference job: factories, weight files, exported programs, embedders."""
