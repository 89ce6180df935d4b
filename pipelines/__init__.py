"""Sequences of tasks on a Ray cluster: the command line, the durable run, one stage, search, submission, serving."""
