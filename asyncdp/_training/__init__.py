"""Training steps: forward, backward and optimizer step on all lanes."""
