"""Engines: what runs a stage's forward, backward and step. The one place that knows DeepSpeed.

Both engines read and write the trainable state (fp32 master weights and Adam's moments) by parameter name and whole,
so that a checkpoint means the same at every world size and ZeRO stage.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from amlora_dist.errors import UserError
from amlora_dist.training.optimizer import ProximalAdamW, set_rates

log = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")


class Ranks(Protocol):
    """The processes that work on one stage, seen from one of them."""

    rank: int
    world: int

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""

    def gather(self, value: Any) -> list[Any]:
        """One value of each rank, in the order of ranks, on every rank."""


class Alone:
    """One process, no process group."""

    rank, world = 0, 1

    def sum(self, values: Tensor) -> Tensor:
        return values

    def gather(self, value: Any) -> list[Any]:
        return [value]


class DistributedRanks:
    """The default process group of torch.distributed, which Ray Train (or torchrun) has made."""

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def sum(self, values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, value)
        return out


class TrainingEngine(Protocol):
    """One rank's view of a model in training."""

    model: nn.Module
    ranks: Ranks
    device: torch.device
    whole_forward: bool
    """True where a forward pass must not be cut short (ZeRO-3 would leave gathered parameters behind)."""

    def forward(self, **inputs: Any) -> Any: ...
    def backward(self, loss: Tensor) -> None:
        """``loss`` is this rank's part of the global loss: the gradients of all ranks and micro-batches add up."""

    def step(self, factor: float, phase: int = 1, *, refit: bool = False) -> None:
        """One optimizer step at ``factor`` times the base learning rates."""

    def drop_gradients(self) -> None:
        """Forget the gradients of a step that is not taken, on every rank. What the weights and moments are then is nobody's
        to read before ``import_state``."""

    def whole(self, parameters: list[nn.Parameter]) -> AbstractContextManager[object]:
        """Inside, the given parameters are whole on every rank; to be entered by all ranks."""
    def export_state(self) -> dict[str, Tensor]:
        """``master.<name>``, ``exp_avg.<name>``, ``exp_avg_sq.<name>``: whole fp32 tensors on the CPU, on every rank."""

    def import_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Take up what ``export_state`` gave after ``steps`` optimizer steps, at any world size and ZeRO stage."""

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all that ``export_state`` gives."""

    def destroy(self) -> None:
        """Let go of the model, on every rank, after its last pass; ZeRO-3 leaves no parameter whole."""


def _state_shapes(trainable: Mapping[str, nn.Parameter]) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in trainable.items()}
    return {f"{key}.{name}": shape for name, shape in shapes.items() for key in ("master", *MOMENTS)}


class PlainEngine:
    """One process without DeepSpeed: fp32 master weights next to a model of any dtype."""

    whole_forward = False

    def __init__(
        self,
        model: nn.Module,
        trainable: Mapping[str, nn.Parameter],
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float],
        clip: float,
        device: torch.device,
    ) -> None:
        self.model, self.device, self._clip = model.to(device), device, clip
        self.ranks: Ranks = Alone()
        self._parameters = dict(trainable)
        self._masters = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float().clone())
            for name, p in self._parameters.items()
        }
        by_parameter = {id(p): self._masters[name] for name, p in self._parameters.items()}
        groups = [group | {"params": [by_parameter[id(p)] for p in group["params"]]} for group in groups]
        self._optimizer = ProximalAdamW(groups, betas=betas)

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        for name, parameter in self._parameters.items():
            master = self._masters[name]
            if master is not parameter and parameter.grad is not None:
                master.grad = parameter.grad.float() if master.grad is None else master.grad + parameter.grad.float()
                parameter.grad = None

    def step(self, factor: float, phase: int = 1, *, refit: bool = False) -> None:
        set_rates(self._optimizer, factor, phase, refit=refit)
        if self._clip:
            nn.utils.clip_grad_norm_(list(self._masters.values()), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._copy_masters()

    def drop_gradients(self) -> None:
        for parameter in (*self._parameters.values(), *self._masters.values()):
            parameter.grad = None

    def _copy_masters(self) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                if self._masters[name] is not parameter:
                    parameter.copy_(self._masters[name])

    def whole(self, parameters: list[nn.Parameter]) -> AbstractContextManager[object]:
        return contextlib.nullcontext()

    def export_state(self) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name, master in self._masters.items():
            out[f"master.{name}"] = master.detach().cpu().clone()
            for key in MOMENTS:
                moment = self._optimizer.state.get(master, {}).get(key)
                out[f"{key}.{name}"] = torch.zeros_like(out[f"master.{name}"]) if moment is None else moment.cpu().clone()
        return out

    def import_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        with torch.no_grad():
            for name, master in self._masters.items():
                master.copy_(state[f"master.{name}"])
                self._optimizer.state[master] = {"step": torch.tensor(float(steps))} | {
                    key: state[f"{key}.{name}"].to(master.device, copy=True) for key in MOMENTS
                }
        self._copy_masters()

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return _state_shapes(self._parameters)

    def destroy(self) -> None:
        """Nothing but this object holds what it has made."""


@dataclass(frozen=True, slots=True)
class _Fragment:
    """The part of one parameter that this rank's optimizer holds.

    Elements ``start : start + count`` of the flattened parameter are ``flat[offset : offset + count]``, where
    ``flat`` is the tensor that keys the optimizer's state.
    """

    flat: Tensor
    offset: int
    start: int
    count: int

    def narrow(self, whole: Tensor) -> Tensor:
        return whole.view(-1).narrow(0, self.offset, self.count)


class DeepSpeedEngine:
    """ZeRO 0 to 3 on the process group that Ray Train (or torchrun) has made."""

    def __init__(
        self,
        model: nn.Module,
        trainable: Mapping[str, nn.Parameter],
        groups: list[dict[str, Any]],
        *,
        config: dict[str, Any],
        betas: tuple[float, float],
    ) -> None:
        deepspeed = _deepspeed()
        self._trainable = dict(trainable)
        self._client = ProximalAdamW([group | {"lr": 0.0} for group in groups], betas=betas)
        self._engine, _, _, _ = deepspeed.initialize(
            model=model, config=config, optimizer=self._client, dist_init_required=False
        )
        # bf16 without ZeRO makes an optimizer step at start, to allocate moments: at rate 0, and forgotten here.
        self._client.state.clear()
        self._optimizer = self._engine.optimizer
        self._stage = int(config["zero_optimization"]["stage"])
        self.model: nn.Module = self._engine.module
        self.ranks: Ranks = DistributedRanks()
        self.device = torch.device(self._engine.device)
        self.whole_forward = self._stage == 3
        self._accumulation = int(config["gradient_accumulation_steps"])

    def forward(self, **inputs: Any) -> Any:
        return self._engine(**inputs)

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed divides by the accumulation steps and averages over ranks; our parts add up.
        self._engine.backward(loss * (self.ranks.world * self._accumulation))
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def step(self, factor: float, phase: int = 1, *, refit: bool = False) -> None:
        set_rates(self._client, factor, phase, refit=refit)
        self._engine.step()

    def drop_gradients(self) -> None:
        # Gradients lie in ZeRO's buckets and partitions, and micro-batches are counted: only a step ends both.
        self.step(0.0)

    def whole(self, parameters: list[nn.Parameter]) -> AbstractContextManager[object]:
        return whole_parameters(parameters)

    def export_state(self) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name, parameter in self._trainable.items():
            fragment = self._fragment(parameter)
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            state = {} if fragment is None else self._client.state.get(fragment.flat, {})
            for key in ("master", *MOMENTS):
                whole = torch.zeros(shape, dtype=torch.float32, device=self.device)
                source = fragment.flat if fragment is not None and key == "master" else state.get(key)
                if fragment is not None and source is not None:
                    part = fragment.narrow(source.detach()).to(self.device)
                    whole.view(-1).narrow(0, fragment.start, fragment.count).copy_(part)
                if self._partitioned:
                    # Each element lives on one rank, the others add integer zeros: exact to the last bit.
                    dist.all_reduce(whole.view(torch.int32))
                out[f"{key}.{name}"] = whole.cpu()
        return out

    def import_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        with torch.no_grad():
            for name, parameter in self._trainable.items():
                master = state[f"master.{name}"]
                with self._writable(parameter):
                    if not self.whole_forward or self.ranks.rank == 0:
                        parameter.copy_(master.to(parameter.device, parameter.dtype))
                fragment = self._fragment(parameter)
                if fragment is None:
                    continue
                kept = self._client.state[fragment.flat]
                if "step" not in kept:
                    kept.update({key: torch.zeros_like(fragment.flat) for key in MOMENTS})
                kept["step"] = torch.tensor(float(steps))
                for target, key in ((fragment.flat.detach(), "master"), *((kept[key], key) for key in MOMENTS)):
                    part = state[f"{key}.{name}"].reshape(-1).narrow(0, fragment.start, fragment.count)
                    fragment.narrow(target).copy_(part.to(target.device))

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return _state_shapes(self._trainable)

    def destroy(self) -> None:
        _destroy(self._engine)

    @property
    def _partitioned(self) -> bool:
        return self._stage > 0 and self.ranks.world > 1

    def _writable(self, parameter: nn.Parameter) -> AbstractContextManager[None]:
        if not self.whole_forward:
            return contextlib.nullcontext()
        context: AbstractContextManager[None] = _deepspeed().zero.GatheredParameters([parameter], modifier_rank=0)
        return context

    def _fragment(self, parameter: nn.Parameter) -> _Fragment | None:
        if self._stage == 3:
            return self._fragment_of_stage_3(parameter)
        if self._stage > 0:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                return None
            address, held = mapping.lp_fragment_address, mapping.hp_fragment_address
            flat = self._flat_with(parameter)
            return _Fragment(flat, int(held.start), int(address.start), int(address.numel))
        for low, high in zip(*self._stage_0_groups(), strict=True):
            for index, candidate in enumerate(low):
                if candidate is parameter:
                    return _Fragment(high[index], 0, 0, parameter.numel())
        return _Fragment(parameter, 0, 0, parameter.numel())

    def _stage_0_groups(self) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        optimizer = self._optimizer
        if hasattr(optimizer, "fp32_groups"):  # bf16 without ZeRO: DeepSpeed keeps unflattened fp32 copies
            return optimizer.fp16_groups, optimizer.fp32_groups
        return [], []

    def _flat_with(self, parameter: nn.Parameter) -> Tensor:
        for index, members in enumerate(self._optimizer.bit16_groups):
            if any(member is parameter for member in members):
                flat: Tensor = self._client.param_groups[index]["params"][0]
                return flat
        raise KeyError("parameter is in no ZeRO group")

    def _fragment_of_stage_3(self, parameter: nn.Parameter) -> _Fragment | None:
        optimizer = self._optimizer
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = size * self.ranks.rank  # every rank holds an equal part; the last ones are padded
        count = min(int(size), int(parameter.ds_numel) - int(start))  # type: ignore[attr-defined]
        if count <= 0:
            return None
        return _Fragment(optimizer.fp32_partitioned_groups_flat[group], int(offset), int(start), count)


def deepspeed_config(
    section: Mapping[str, Any], *, dtype: torch.dtype, micro: int, accumulation: int, world: int, clip: float
) -> dict[str, Any]:
    """DeepSpeed's configuration: the user's section passed through, with the keys that the product owns computed."""
    config = {key: value for key, value in section.items() if key != "zero_stage"}
    zero = dict(config.get("zero_optimization", {}))
    zero.setdefault("stage", int(section.get("zero_stage", 2)))
    config["zero_optimization"] = zero
    config |= {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * world,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    config.setdefault("steps_per_print", 10**9)
    return config


@contextlib.contextmanager
def partitioned_loading(config: Mapping[str, Any] | None) -> Iterator[None]:
    """Inside, ``from_pretrained`` gives each rank its part only, when the configuration says ZeRO-3."""
    if config is None or int(config["zero_optimization"]["stage"]) != 3:
        yield
        return
    _deepspeed()
    # deepspeed.zero.Init replaces Tensor.__new__; torch 2.13 fails when torch._dynamo is first imported under it.
    importlib.import_module("torch._dynamo")
    from transformers.integrations import HfDeepSpeedConfig

    keep = HfDeepSpeedConfig(dict(config))  # transformers holds it by a weak reference only
    try:
        yield
    finally:
        del keep


@contextlib.contextmanager
def partitioned_construction(config: Mapping[str, Any]) -> Iterator[None]:
    """Inside, parameters are made without values and each rank keeps its part only, as soon as its module is made."""
    deepspeed = _deepspeed()
    importlib.import_module("torch._dynamo")  # see partitioned_loading
    from transformers.initialization import no_init_weights
    from transformers.integrations.deepspeed import prevent_arange_dtype_change

    # zero.Init would make rotary frequencies in the model's dtype: the second context keeps them.
    with no_init_weights(), prevent_arange_dtype_change(), deepspeed.zero.Init(config_dict_or_path=dict(config)):
        yield


def partition_of(parameter: nn.Parameter) -> tuple[Tensor, int, int]:
    """This rank's flat part of a partitioned parameter, its place in the flattened whole, and how many of its elements
    are not padding."""
    part: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    size, whole = int(part.ds_numel), int(parameter.ds_numel)  # type: ignore[attr-defined]
    start = size * dist.get_rank()
    return part, start, max(0, min(size, whole - start))


def whole_parameters(parameters: list[nn.Parameter]) -> AbstractContextManager[object]:
    """Inside, parameters that ZeRO-3 has partitioned are whole on every rank."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return contextlib.nullcontext()
    context: AbstractContextManager[object] = _deepspeed().zero.GatheredParameters(parameters)
    return context


def local_part(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter: its partition under ZeRO-3, else all of it."""
    part: Tensor = getattr(parameter, "ds_tensor", parameter)
    return part


def inference_model(model: nn.Module, config: Mapping[str, Any]) -> tuple[nn.Module, Callable[[], None]]:
    """A model without anything to train, made ready to run, and what lets go of it after its last pass.

    ZeRO-3 gathers its layers as they are needed.
    """
    if int(config["zero_optimization"]["stage"]) != 3:
        return model, lambda: None
    engine, _, _, _ = _deepspeed().initialize(model=model, config=dict(config), dist_init_required=False)
    return engine.module, partial(_destroy, engine)


def _destroy(engine: Any) -> None:
    """Take a DeepSpeed engine apart; its hooks on modules go with ``module_state``.

    Raises:
        RuntimeError: a parameter that ZeRO-3 shares out cannot be let go of.
    """
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    try:
        engine.empty_partition_cache()  # small parameters stay whole between passes
    finally:
        engine.destroy()
        parameter_offload.FWD_MODULE_STACK.clear()  # each engine adds its model, and takes nothing away
        for member in vars(PartitionedParameterCoordinator).values():
            within = [cell.cell_contents for cell in getattr(member, "__closure__", None) or ()]  # of a decorated one
            for function in (member, *within):
                if hasattr(function, "cache_clear"):  # remembers every coordinator that asked, and so its model
                    function.cache_clear()


def join_process_group() -> None:
    """Let DeepSpeed adopt the process group that exists, without compiling anything."""
    _deepspeed().init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)


def _deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    try:
        with _unimportable("mlflow"):
            deepspeed = importlib.import_module("deepspeed")
    except ImportError as error:
        raise UserError(f"deepspeed is not importable ({error}); install it or set workers=0") from error
    # Without this switch the first run compiles an extension, and a killed build hangs every later process.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextlib.contextmanager
def _unimportable(name: str) -> Iterator[None]:
    """Inside, importing ``name`` fails: DeepSpeed's autotuner takes mlflow if it can, five seconds for every worker."""
    absent = name not in sys.modules
    if absent:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if absent:
            del sys.modules[name]
