"""Put a bank into a transformers model, and take the new adapter out again."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from amlora_dist.adapters.adapted_layers import AdaptedLayers
from amlora_dist.adapters.adapter import Adapter
from amlora_dist.adapters.forward import RoutedForward, RoutedGenerate, Routing
from amlora_dist.adapters.gate_context import active_call
from amlora_dist.adapters.mixture import Gather, MixtureLinear, NewWeights
from amlora_dist.adapters.targets import Target, check_router_layer, default_router_layer, routing_stack
from amlora_dist.digests import named_seed
from amlora_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from amlora_dist.adapters.router import Router
    from amlora_dist.adapters.trunk import Trunk

FLAT_INPUTS = {"opt": ("fc1", "fc2")}
"""Layers, by ``config.model_type``, whose input has lost its batch axis."""

@dataclass(kw_only=True, slots=True)
class NewAdapter:
    """What a stage learns: one adapter on top of the bank."""

    task: str
    rank: int
    alpha: float
    seed: int = 0
    """Start of the random numbers of ``a``; every module draws from a generator of its own."""
    init: dict[str, tuple[Tensor, Tensor]] | None = None
    """Start values (a, b) by module path; default: LoRA's (a uniform, b zero)."""
    recipe_init: dict[str, Tensor] | None = None
    """Start values (earlier adapters,) by module path; default: zeros."""
    learn_recipe: bool = True
    """Learn the weights of earlier adapters; otherwise ``recipe_init`` is a constant row."""
    dropout: float = 0.0
    """Share of the adapter's input that calls with ``dropout_keys`` drop."""


class Mixture:
    """A model with a bank in it: the handle that ``inject`` returns. Not a module; the model owns all parameters."""

    def __init__(
        self,
        model: PreTrainedModel,
        targets: list[Target],
        adapters: list[Adapter],
        new: NewAdapter | None,
        modules: dict[str, MixtureLinear],
        layers: AdaptedLayers,
        routing: Routing,
        router_layer: int,
    ) -> None:
        self.model = model
        self.targets = targets
        self.new = new
        self.modules = modules
        self.layers = layers
        self.routing = routing
        self.router_layer = router_layer
        self.task_names = [adapter.task for adapter in adapters] + ([new.task] if new is not None else [])
        self.device: torch.device = next(iter(modules.values())).mix_bits.device
        self.disabled: int | None = None
        """The adapter that ``disable_adapter`` named."""
        self._undo: list[Callable[[], None]] = []
        self._trunk: Trunk | None = None
        self._packs = False
        self._wrap()

    @property
    def router(self) -> Router | None:
        """What weighs the adapters; None if every call brings its gate."""
        return self.routing.router

    def set_router(self, router: Router | None) -> None:
        """Use ``router`` from the next call on. Between calls only: a KV cache keeps the gate it has."""
        if router is not None:
            if list(router.tasks) != self.task_names:
                raise UserError(f"router: its tasks are {list(router.tasks)}, the bank's are {self.task_names}")
            router = router.to(self.device)
        self.routing.router = router

    def run_whole_passes(self, whole: bool) -> None:
        """Never end a pass early at the routing layer: under ZeRO-3 an aborted pass leaves parameters gathered, and
        ranks would make unequal numbers of collectives. Between calls."""
        self.routing.whole_passes = whole

    def use_selectors(self, use: bool) -> None:
        """Let the layers' own selectors gate them, or task gates as elsewhere. Between calls."""
        if use and not self.layers.selects:
            raise UserError("this mixture was injected without selectors")
        self.routing.select = use

    def disable_adapter(self, adapter: int | None) -> None:
        """Let one adapter (0-based) add nothing, wherever gates or recipes use it; None: none is disabled. Between calls."""
        self.disabled = adapter
        for module in self.modules.values():
            module.disabled = adapter

    def try_row(self, row: dict[str, Tensor] | None) -> None:
        """Weigh the adapters by this row (N,) of each module path, whatever a call's gate; gradients reach it. None: by
        gates again. Between calls."""
        for path, module in self.modules.items():
            module.tried = None if row is None else row[path]

    def set_rows(self, rows: dict[str, Tensor]) -> None:
        """Take other rows of G (T, N), by module path; the row that is being learned stays. Between calls."""
        for path, rows_TN in rows.items():
            self.modules[path].set_rows(rows_TN)

    def one_hot(self, task: int, batch: int) -> Tensor:
        """The gate that gives the whole batch row ``task``, (B, T) fp32. Stages train at the last row."""
        gate = torch.zeros(batch, len(self.task_names), device=self.device)
        gate[:, task] = 1.0
        return gate

    def set_new(self, adapter: Adapter) -> None:
        """Put other values into the adapter in progress, whole parameters only (not under ZeRO-3). Between calls."""
        with torch.no_grad():
            for path, module in self.modules.items():
                assert module.new_a is not None and module.new_b is not None
                module.new_a.copy_(adapter.a[path])
                module.new_b.copy_(adapter.b[path])

    def trainable(self) -> dict[str, nn.Parameter]:
        """What a stage learns, by names that checkpoints use: ``a.<module path>``, ``b.``, ``recipe.``, ``selector.``.

        Grouped by kind, in the model's order of modules.
        """
        named: dict[str, nn.Parameter] = {}
        for kind, attribute in (("a", "new_a"), ("b", "new_b"), ("recipe", "recipe")):
            for path, module in self.modules.items():
                parameter = getattr(module, attribute)
                if parameter is not None:
                    named[f"{kind}.{path}"] = parameter
        for path, module in self.modules.items():
            named |= {f"selector.{path}.{name}": parameter for name, parameter in module.more_trainable().items()}
        return named

    def extract_new(self, gather: Gather | None = None) -> Adapter:
        """A copy, on the CPU, of the adapter in progress.

        ``gather`` is a context manager that makes given parameters whole (ZeRO-3); it is entered for one parameter at
        a time, on every rank.
        """
        if self.new is None:
            raise UserError("no adapter is in progress in this model")
        def copy(parameter: nn.Parameter) -> Tensor:
            with gather([parameter]) if gather is not None else contextlib.nullcontext():
                return parameter.detach().to("cpu", copy=True)

        adapter = Adapter(self.new.task, self.new.rank, self.new.alpha, {}, {})
        for path, module in self.modules.items():
            assert module.new_a is not None and module.new_b is not None
            adapter.a[path], adapter.b[path] = copy(module.new_a), copy(module.new_b)
            if module.recipe is not None:
                adapter.recipe[path] = copy(module.recipe).float()
            elif self.new.recipe_init is not None and not self.new.learn_recipe:
                adapter.recipe[path] = self.new.recipe_init[path].detach().to("cpu", torch.float32, copy=True)
            adapter.selector |= {f"{path}.{name}": tensor for name, tensor in module.more_tensors(gather).items()}
        return adapter

    def routing_features(
        self, *, prompt_mask: Tensor | None = None, full_forward: bool = False, **inputs: Any
    ) -> Tensor:
        """Features of a batch, (B, D) fp32, from the plain model without adapters.

        The pass ends at the routing layer. With ``full_forward`` it runs to the end: under ZeRO-3 an aborted pass
        leaves parameters gathered. ``inputs`` as for the model (of an encoder-decoder: as for its encoder).
        Dropout is off meanwhile.
        """
        forward, training = self._forward, self.model.training
        stop = not (full_forward or self.routing.whole_passes)
        self.model.eval()  # dropout would make statistics of noise
        try:
            return forward.features(inputs, forward.prompt_mask(inputs, prompt_mask), stop=stop)
        finally:
            self.model.train(training)

    def trunk(self) -> Trunk:
        """The layers below the first adapted one, ready to be passed over; errors as in `Trunk`."""
        from amlora_dist.adapters.trunk import Trunk

        if self._trunk is None:
            self._trunk = Trunk(self, self._forward.inner, self._replace, self._undo)
        return self._trunk

    def packing_width(self) -> int:
        """Tokens that sequences are filled up to, once calls with ``packed_rows`` are tried and prepared; under ZeRO-3
        when the engine is made. Errors as in ``try_packing``."""
        from amlora_dist.adapters.packed_rows import WIDTH, pick_tokens, try_packing

        if not self._packs:
            head = try_packing(self)
            self._undo.append(head.register_forward_pre_hook(pick_tokens).remove)
            self._packs = True
        return WIDTH

    def remove(self) -> None:
        """Give the model back as it was, but for parameters that stay frozen."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self._trunk, self._packs = None, False

    def _wrap(self) -> None:
        """Put the layers in, wrap the model's entry points and hook the layers that the router reads."""
        model, routing = self.model, self.routing
        for path, module in self.modules.items():
            model.set_submodule(path, module)
            self._undo.append(partial(model.set_submodule, path, module.base))

        def read_hidden(depth: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = active_call()
            if call is not None and call.owner is routing:
                call.see(depth, args[0] if args else kwargs["hidden_states"])

        stack = routing_stack(model)
        for depth in routing.depths:
            hook = stack.layers[depth].register_forward_pre_hook(partial(read_hidden, depth), with_kwargs=True)
            self._undo.append(hook.remove)
        encoder_forward = None
        if model.config.is_encoder_decoder:
            encoder = model.get_encoder()
            encoder_forward = RoutedForward(encoder.forward, routing, encoder=True)
            self._replace(encoder, "forward", encoder_forward)
        self._forward = RoutedForward(model.forward, routing, encoder_forward=encoder_forward)
        self._replace(model, "forward", self._forward)
        if encoder_forward is None and hasattr(model, "generate"):
            self._replace(model, "generate", RoutedGenerate(model.generate, self._forward))
        self._replace(model, "_amlora_mixture", self)
        routing.checkpointed = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]

    def _replace(self, owner: nn.Module, name: str, value: object) -> None:
        """Set an attribute of the instance; ``remove`` puts back what the instance had, if anything."""
        had = owner.__dict__.get(name)
        # Not nn.Module's own __setattr__: these are no modules, parameters or buffers.
        object.__setattr__(owner, name, value)

        def undo() -> None:
            if had is None:
                object.__delattr__(owner, name)
            else:
                object.__setattr__(owner, name, had)

        self._undo.append(undo)


def inject(
    model: PreTrainedModel,
    targets: list[Target],
    adapters: list[Adapter],
    *,
    new: NewAdapter | None = None,
    router: Router | None = None,
    layers: AdaptedLayers | None = None,
    router_layer: int | None = None,
    depths: Sequence[int] = (),
    skip_tokens: int = 2,
) -> Mixture:
    """Replace the ``targets`` of ``model`` by mixture layers and let the model's calls carry gates.

    All parameters that the model had are frozen. Weights go to the device of the layer they adapt and take its dtype;
    sizes are never read off weights, so that a base partitioned by ZeRO-3 works.

    Args:
        adapters: the bank, in the order of its tasks.
        new: the adapter that a stage learns on top; None for inference.
        router: gives calls their gate; None if each call brings ``task_gate``.
        layers: what the layers are; None for plain ones.
        router_layer: k, features are hidden states after k layers; default: the middle of the depth.
        depths: of earlier layers that features take in too, each below k.
        skip_tokens: first prompt tokens that features leave out, behind the prefix of the layers.

    Raises:
        UserError: if an adapter does not fit the targets, or the model has a mixture already.
    """
    if getattr(model, "_amlora_mixture", None) is not None:
        raise UserError("this model has a mixture already; remove() it first, or load the model again")
    if not adapters and new is None:
        raise UserError("nothing to inject: the bank is empty and no adapter is to be learned")
    k = default_router_layer(model) if router_layer is None else router_layer
    check_router_layer(model, k)
    if any(not 0 <= depth < k for depth in depths):
        raise UserError(f"router.depths: found {list(depths)}, expected layers below the routing layer {k}")
    for adapter in adapters:
        _check_fit(adapter, targets)
    layers = layers or AdaptedLayers()
    model.requires_grad_(False)
    modules: dict[str, MixtureLinear] = {}
    for target in targets:
        learned = _new_weights(new, target, len(adapters)) if new is not None else None
        modules[target.path] = layers.make(model, target, adapters, learned, 0 if new is None else new.seed)
        modules[target.path].dropout = 0.0 if new is None else new.dropout
        modules[target.path].flat_input = target.path.rpartition(".")[2] in FLAT_INPUTS.get(model.config.model_type, ())
    first_part = routing_stack(model).part
    below = any(target.part == first_part and target.layer < k for target in targets)
    tasks = len(adapters) + (new is not None)
    routing = Routing(
        None, tasks, skip_tokens + layers.prefix.tokens, below, select=layers.selects, depths=(*sorted(set(depths)), k),
        layers_read=layers.reads_features,
    )  # fmt: skip
    mixture = Mixture(model, targets, adapters, new, modules, layers, routing, k)
    mixture.set_router(router)
    return mixture


def _check_fit(adapter: Adapter, targets: list[Target]) -> None:
    paths = {target.path for target in targets}
    odd = sorted(paths ^ set(adapter.a)) or sorted(paths ^ set(adapter.b))
    if odd:
        raise UserError(
            f"adapter {adapter.task!r} was trained on other layers than adapters.targets and adapters.layers select: "
            f"{len(odd)} differ, the first is {odd[0]}"
        )
    for target in targets:
        expected = (adapter.rank, target.in_features), (target.out_features, adapter.rank)
        found = tuple(adapter.a[target.path].shape), tuple(adapter.b[target.path].shape)
        if found != expected:
            raise UserError(
                f"adapter {adapter.task!r}, {target.path}: found A and B of shapes {found[0]} and {found[1]}, "
                f"expected {expected[0]} and {expected[1]}: it belongs to another base model"
            )


def _new_weights(new: NewAdapter, target: Target, earlier: int) -> NewWeights:
    if new.init is not None:
        a, b = (tensor.detach().clone() for tensor in new.init[target.path])
    else:
        # LoRA's own start: A as nn.Linear starts its weight (kaiming uniform, a = sqrt 5), B zero.
        generator = torch.Generator().manual_seed(named_seed(new.seed, "lora", target.path))
        bound = 1 / math.sqrt(target.in_features)
        a = torch.empty(new.rank, target.in_features).uniform_(-bound, bound, generator=generator)
        b = torch.zeros(target.out_features, new.rank)
    recipe = None
    if earlier:
        start = (new.recipe_init or {}).get(target.path)
        recipe = torch.zeros(earlier) if start is None else start.detach().clone().float()
    return NewWeights(a, b, new.alpha / new.rank, recipe, new.learn_recipe)
