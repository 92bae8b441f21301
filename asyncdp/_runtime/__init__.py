"""Lanes, completions and the scheduler: knows threads and event loops, not torch modules."""
