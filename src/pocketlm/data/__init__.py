"""From text to micro-batches: ``corpora``, ``shards``, ``batching``, ``loader``, in this order."""
