"""``internvl bench``: what a client sees of a server under a load."""
