"""From a chat request to a prompt, and from generated ids to an answer."""
