"""/v1/completions as another rendering of a prepared chat: what is not about its own shapes happens
in ``server.chat``."""
