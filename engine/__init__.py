"""Schedule, cache, run: the engine process, and the client the front end talks to it through."""
