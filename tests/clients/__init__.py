"""Clients of other people against the demo model, through a real socket, in an environment of
their own: they pin each other's versions. `make clients` runs them; .venv-clients has no torch, the
server is started from .venv."""
