"""Durable runs: what a sequence is made of, its stages one after another, its journal in MLflow, comparisons of runs."""
