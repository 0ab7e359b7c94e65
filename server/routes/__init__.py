"""One module per group of routes; a handler only calls into the rest of the server."""
