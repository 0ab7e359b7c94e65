"""Other APIs than OpenAI's chat: their requests become chat requests, and the chunks of the answer
become their events. A dialect adds no way to prompt or to generate."""
