"""The configuration of a run: its sections' dataclasses made one tree, read from YAML, overridden and checked."""
