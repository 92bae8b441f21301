"""Checkpoints: the state of a training, on disk as torch.distributed.checkpoint has it."""
