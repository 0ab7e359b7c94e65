"""``internvl run-batch``: files of requests in the form of OpenAI's batch API."""
