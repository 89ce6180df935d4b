"""Banks as versioned objects: their folder format, and the store (MLflow) that keeps versions, runs and claims."""
