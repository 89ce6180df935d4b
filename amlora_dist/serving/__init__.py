"""A bank behind HTTP: an engine that batches requests across adapters, and an OpenAI-compatible app. Knows no Ray."""
