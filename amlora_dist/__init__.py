"""Attentional Mixture of LoRAs (arXiv 2409.19611): mixture, training stage, registry.

The library knows nothing of Ray: ``pipelines`` stands above it and runs it on a cluster.
Importing the package is cheap; ``torch`` is imported by the modules that compute.
"""

__version__ = "0.1.0"
