"""One small interface to a device, and its drivers."""
