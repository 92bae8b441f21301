"""What a batch-inference job reports while it runs and at its end."""
