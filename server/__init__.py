"""The front end: HTTP in, prepared requests to the engine, text and SSE out. Never loads torch."""
