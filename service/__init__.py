"""Requests in, files out: the API, the queue, the results and the workers."""
