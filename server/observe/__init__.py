"""What is told of requests: notes, logs, metrics, traces."""
