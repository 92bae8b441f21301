"""Inference jobs over a Ray cluster: Ray places processes and watches them, the rest is asyncdp's own."""
