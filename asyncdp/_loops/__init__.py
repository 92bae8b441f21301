"""The only rooms that know asyncio and trio."""
