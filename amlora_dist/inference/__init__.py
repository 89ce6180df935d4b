"""A finished bank in use: loaded into its base model, answering plain texts, taking in adapters from elsewhere."""
