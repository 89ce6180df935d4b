"""``amlora tune``: Ray Tune over whole sequences."""
