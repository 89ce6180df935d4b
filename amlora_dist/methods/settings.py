"""Settings that methods other than AM-LoRA read. Imports nothing heavy."""

from __future__ import annotations

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass


@dataclass(config=ConfigDict(extra="forbid"), kw_only=True, slots=True)
class MethodSettings:
    """One section for all methods, so that one configuration can be run by each; a method reads what it names."""

    ortho_weight: float = Field(default=20.0, ge=0)
    """``o_lora``: weight of the overlap between the new adapter's directions and the earlier ones'."""
    memory_rows: int = Field(default=0, ge=0)
    """``am_lora``: held-out rows of each earlier task of the run, at most, on which the weights of its row are refitted at
    the end of every later stage (``training.recipe_refit``); 0: earlier rows stay as they are. The rows are read from the
    task's own training data again; nothing of them is stored."""
    replay_rows: int = Field(default=16, ge=1)
    """``replay``: training rows of each earlier task that later stages see again, at most."""
    ewc_weight: float = Field(default=100.0, ge=0)
    """``ewc``: weight of the quadratic penalty on leaving the earlier tasks' adapter."""
    ewc_rows: int = Field(default=64, ge=1)
    """``ewc``: training rows of a task that its Fisher information is estimated on, at most."""
    lwf_weight: float = Field(default=1.0, ge=0)
    """``lwf``: weight of the distillation from the model before the stage."""
    lwf_temperature: float = Field(default=2.0, gt=0)
    """``lwf``: temperature of both distributions in the distillation."""
    ella_weight: float = Field(default=1.0, ge=0)
    """``ella``: weight of the new update's energy where earlier ones have theirs."""
    gain_energy: float = Field(default=0.97, gt=0, le=1)
    """``gainlora``: share of the second moment of earlier tasks' features that spans what a new gate must not see."""
    prompt_pool: int = Field(default=160, ge=1)
    """``l2p``: prompts in the pool, each of one token."""
    prompt_tokens: int = Field(default=10, ge=1)
    """``l2p``: prompts in front of an input; every stage trains as many new ones, while the pool has some left."""

    def __post_init__(self) -> None:
        if self.prompt_tokens > self.prompt_pool:
            raise ValueError(f"prompt_tokens {self.prompt_tokens} of a pool of {self.prompt_pool} (prompt_pool)")
