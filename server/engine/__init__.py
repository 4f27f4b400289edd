"""The batching engine: queues, batches, rates, times."""
