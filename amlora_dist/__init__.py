"""Attentional Mixture of LoRAs (arXiv 2409.19611): mixture, training stage, registry.

The library knows nothing of Ray: ``pipelines`` is above it and runs it on a cluster.
Importing the package is cheap; ``torch`` is imported by the modules that compute.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amlora_dist.inference.model import AMLoRAModel

__all__ = ["AMLoRAModel", "__version__"]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is first asked for."""
    if name == "AMLoRAModel":
        from amlora_dist.inference.model import AMLoRAModel

        return AMLoRAModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
