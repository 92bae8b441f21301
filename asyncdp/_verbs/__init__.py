"""The verbs of data parallelism: scatter, replicate, parallel_apply, gather and backward."""
