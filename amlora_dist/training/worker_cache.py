"""What a process that runs one stage after another has once and keeps: the base model, its tokenizer, rows as tokens, and
what the base model alone makes of texts.

A stage puts its adapters into the base model and gives the model back as it was loaded (``module_state``); the next one
reads the adapters that were committed. So the base model is read once, and a bank in a model that stayed equals one in a
model that was just loaded, bit for bit.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from amlora_dist.base_model import BaseModel, load_model, load_tokenizer
from amlora_dist.digests import value_digest
from amlora_dist.errors import TrainingError
from amlora_dist.quantisation import scales
from amlora_dist.training.checksum import weights_checksum
from amlora_dist.training.module_state import ModuleState
from amlora_dist.training.zero3_loading import load_partitioned

log = logging.getLogger(__name__)

MOST_TOKENS = 8_000_000
"""Of rows that are kept, over all tasks: some 300 MB. Those that were used longest ago go."""

MOST_FEATURES = 32_000_000
"""Numbers among the features that are kept, of all ranks: 128 MB. Those that were used longest ago go."""

RowsT = TypeVar("RowsT", bound=Sequence[Any])


class WorkerCache:
    """Belongs to one process. ``stage`` is entered for each stage; the rest is for use inside it."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._model: Any = None
        self._state: ModuleState | None = None
        self._stays = True
        self._checksum: tuple[int, int] | None = None
        self._tokenizer: tuple[str, Any] | None = None
        self._rows: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._features: OrderedDict[Hashable, tuple[Tensor, int]] = OrderedDict()
        self.loads = 0
        """How often a base model was read."""

    @contextlib.contextmanager
    def stage(self) -> Iterator[None]:
        """Inside, one stage uses the model. A stage that fails leaves no model: the next one loads it."""
        try:
            yield
        except BaseException:
            self.forget_model()
            raise
        if self._state is not None and self._stays:
            self._state.restore()
        else:
            self.forget_model()
        _collect()

    def forget_model(self) -> None:
        """Let the base model go."""
        self._key = self._model = self._state = self._checksum = None

    def base_model(
        self,
        base: BaseModel,
        *,
        config: Mapping[str, Any] | None,
        dtype: torch.dtype,
        attention: str,
        device: torch.device,
        gradient_checkpointing: bool,
    ) -> Any:
        """The frozen base model without adapters, in evaluation mode, where it runs; all ranks call this together.

        Args:
            base: which one.
            config: DeepSpeed's, resolved; None without it. Under ZeRO-3 the model is shared out over the ranks.
            dtype: of its weights.
            attention: transformers' implementation.
            device: of this rank.
            gradient_checkpointing: turn it on.
        """
        zero = {} if config is None else dict(config["zero_optimization"])
        partitioned = zero.get("stage") == 3
        key = (
            base.identity, str(base.path), dtype, attention, str(device), gradient_checkpointing,
            value_digest(zero) if partitioned else None,
        )  # fmt: skip
        if key == self._key:
            return self._model
        self.forget_model()
        _collect()  # two at once may not fit
        if config is not None and partitioned:
            model = load_partitioned(base, config, dtype=dtype, attention=attention)
        else:
            model = load_model(base, dtype=dtype, attention=attention, device=device).to(device)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable()
        self.loads += 1
        self._key, self._model, self._state = key, model, ModuleState(model)
        # Parts of parameters that DeepSpeed swaps out and in lie where only its engine knows: they go with the engine.
        self._stays = not (partitioned and zero.get("offload_param"))
        return model

    def base_checksum(self) -> tuple[int, int]:
        """Checksum of the base model's weights as this rank holds them.

        Raises:
            TrainingError: it differs from what it was when the model was loaded.
        """
        assert self._state is not None, "a stage has loaded its base model"
        found = weights_checksum((*self._state.parameters, *scales(self._model)))
        if self._checksum is None:
            self._checksum = found
        if found != self._checksum:
            raise TrainingError("the base model has changed since it was loaded")
        return found

    def base_parameters(self) -> set[int]:
        """Identities of the base model's parameters."""
        return set() if self._state is None else {id(parameter) for parameter in self._state.parameters}

    def tokenizer(self, base: BaseModel) -> Any:
        """The base model's tokenizer."""
        if self._tokenizer is None or self._tokenizer[0] != f"{base.digest} {base.path}":
            self._tokenizer = f"{base.digest} {base.path}", load_tokenizer(base.path)
        return self._tokenizer[1]

    def rows(self, key: Hashable | None, make: Callable[[], RowsT], size: Callable[[RowsT], int]) -> RowsT:
        """What ``make`` gives, from the second time on as it was.

        Args:
            key: all that decides it; None: make it every time.
            make: reads or tokenises rows.
            size: of what it gives, in tokens.
        """
        if key is None:
            return make()
        if key not in self._rows:
            made = make()
            self._rows[key] = made, size(made)
        self._rows.move_to_end(key)
        while len(self._rows) > 1 and sum(tokens for _, tokens in self._rows.values()) > MOST_TOKENS:
            self._rows.popitem(last=False)
        rows: RowsT = self._rows[key][0]
        return rows

    def features(self, key: Hashable, rows: int, make: Callable[[], Tensor]) -> Tensor:
        """What the base model makes of texts: computed once, everybody's, and nobody's to change.

        Args:
            key: all that decides it besides the base model that was loaded last: the texts, how they are read, and which of
                them this rank reads.
            rows: texts of all ranks: what goes to make room goes on all of them, who compute together under ZeRO-3.
            make: computes it, (this rank's rows, F).
        """
        key = (self._key, key)
        if key not in self._features:
            made = make()
            self._features[key] = made, rows * made.shape[1]
        self._features.move_to_end(key)
        found = self._features[key][0]
        while sum(size for _, size in self._features.values()) > MOST_FEATURES:
            self._features.popitem(last=False)
        return found


def _collect() -> None:
    """Free what a stage has left in circles, and give the pages back to the system where the C library keeps them.

    Whoever runs stages has frozen (``gc.freeze``) what was there before the first: 700,000 modules, classes and functions of
    libraries, in which to look for circles took a second or two after every stage.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)
