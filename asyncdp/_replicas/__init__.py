"""Replicas of a module that persist from call to call, and behave as if made afresh."""
