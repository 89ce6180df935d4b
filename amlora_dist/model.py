"""What an application holds: a bank in its base model, ready to route, answer and classify.

::

    model = AMLoRAModel.from_bank("models:/helpdesk@champion")
    for found in model.classify(["My invoice is wrong"]):
        print(found.label, found.route.task)

A pulled folder needs neither MLflow nor Ray nor DeepSpeed.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amlora_dist.adapters.inject import Mixture
from amlora_dist.adapters.literal import mean_over_prompt
from amlora_dist.adapters.router import Router
from amlora_dist.adapters.task_choice import OnlyTasks, SomeGiven, SwitchRouter, routed_by
from amlora_dist.bank_loading import (
    chosen_attention,
    chosen_device,
    chosen_dtype,
    inject_bank,
    pulled,
    resolve_bank_base,
    sharing_copy,
)
from amlora_dist.base_model import BaseModel, load_model, load_tokenizer
from amlora_dist.errors import UserError
from amlora_dist.evaluation.decoding import Decoder, Prefilled, contexts_per_pass, picked, plan_labels
from amlora_dist.inference import (
    Answer,
    Classification,
    Prompter,
    Request,
    Route,
    batches,
    mean_rows,
    routes,
    tensors,
)
from amlora_dist.registry.bank_folder import Bank, read_bank
from amlora_dist.registry.signing import Trust
from amlora_dist.training.batching import prompt_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["AMLoRAModel", "Answer", "Classification", "Route"]

Names = str | None | Sequence[str | None]
"""One for all texts, or one for each."""


class AMLoRAModel:
    """A bank in its base model. ``from_bank`` makes one.

    Several threads may use one model at once: what belongs to a call travels with the call.
    """

    transformer: PreTrainedModel
    """The transformers model with the mixture layers in it, for tools that want one (pipelines, streamers)."""
    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        bank: Bank,
        base: BaseModel,
        transformer: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        mixture: Mixture,
        *,
        uri: str | None = None,
    ) -> None:
        self.bank, self.base, self.transformer, self.tokenizer = bank, base, transformer, tokenizer
        self.mixture = mixture
        self.uri = uri
        """``models:/NAME/VERSION``; None for a bank that came as a folder."""
        self._router: Router | None = None
        self._plain = transformer
        """The base model without a bank, which shares its weights with ``transformer``; set by ``from_bank``."""
        self.rows_TN = mean_rows(bank.adapters)
        positions = getattr(transformer.config, "max_position_embeddings", None)
        self.prompter = Prompter(bank.manifest, tokenizer, positions)
        self.decoder = Decoder(
            transformer,
            pad_id=int(tokenizer.pad_token_id),
            eos_id=int(tokenizer.eos_token_id),
            encoder_decoder=base.encoder_decoder,
        )

    @classmethod
    def from_bank(
        cls,
        bank: str | Path,
        *,
        base: str | Path | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        tracking_uri: str | None = None,
        beside: AMLoRAModel | None = None,
        require_signature: str | Path | None = None,
        expect_digest: str | None = None,
    ) -> AMLoRAModel:
        """Load a bank and its base model.

        Args:
            bank: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, or the folder of a bank. A version is pulled once
                to ``AMLORA_HOME/banks``.
            base: folder or Hub id of the base model, where it is not at the place that the bank names.
            device: default: the first GPU, or the CPU.
            dtype: ``fp32``, ``bf16``, ``fp16`` or a torch dtype; default: bf16 where the device has it, else fp32.
            tracking_uri: MLflow that has the version; default: the store in ``AMLORA_HOME``.
            beside: a model in use, whose base model's weights are shared instead of loaded again where both banks have
                the same base model; ``device`` and ``dtype`` are then its own.
            require_signature: PEM file of the public key that must have signed the whole bank.
            expect_digest: of its manifest, as ``amlora verify`` prints it.

        Raises:
            UserError: no such version or folder; the base model is not there, or is another one than the bank was
                trained on (by digest).
            BankError: the bank is damaged.
        """
        uri: str | None = None
        trust = Trust.of(require_signature, expect_digest)
        if str(bank).startswith("models:"):
            uri, folder = pulled(str(bank), tracking_uri, trust)
        else:
            folder = Path(bank).expanduser()
            trust.check(folder)
        loaded = read_bank(folder, statistics=False)
        found = resolve_bank_base(loaded.manifest.base, base)
        if beside is not None and beside.base.digest == found.digest:
            plain = beside._plain
        else:
            where = chosen_device(device)
            attention = chosen_attention(loaded.manifest, where)
            plain = load_model(found, dtype=chosen_dtype(dtype, where), attention=attention)
            plain.to(where)
        transformer = sharing_copy(plain)
        tokenizer = load_tokenizer(found.path)
        mixture = inject_bank(transformer, loaded, eos_id=int(tokenizer.eos_token_id))
        made = cls(loaded, found, transformer, tokenizer, mixture, uri=uri)
        made._plain = plain
        return made

    # ---- what it is -------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> list[str]:
        """The bank's tasks, in the order in which they were learned."""
        return self.bank.manifest.tasks

    @property
    def base_model_path(self) -> Path:
        """Local folder of the base model."""
        return self.base.path

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.mixture.device

    def labels(self, task: str) -> list[str] | None:
        """Labels of a task; None where its answers are free text."""
        return self.prompter.entry(task).labels

    def labels_of(self, task: str) -> list[str]:
        """Labels of a task that has some.

        Raises:
            UserError: its answers are free text.
        """
        found = self.labels(task)
        if found is None:
            raise UserError(f"task {task!r} has free-text answers, no labels: give labels, or use answer()")
        return found

    def __repr__(self) -> str:
        base = self.base.source
        return f"AMLoRAModel({self.uri or self.bank.manifest.run_id!r}, base={base!r}, tasks={self.tasks})"

    # ---- transformers' own calls ------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward: ``input_ids``, ``attention_mask``, ...; returns transformers' ``ModelOutput``.

        Takes also ``task_gate`` (B, T), to weigh the tasks oneself, and ``prompt_mask`` (B, tokens).
        """
        with routed_by(self._router):
            return self.transformer(*args, **kwargs)

    __call__ = forward

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``generate`` on token ids, each prompt routed by itself; ``answer`` takes texts."""
        with routed_by(self._router):
            return self.transformer.generate(*args, **kwargs)

    # ---- texts ------------------------------------------------------------------------------------------------

    def route(self, texts: str | Sequence[str], *, question: Names = None, batch_size: int = 16) -> list[Route]:
        """Which tasks and adapters each text would use, and how strongly; a pass through half of the model's depth.

        Args:
            texts: plain texts; the bank's prompt is put around them.
            question: asked of the text, for one or each.
            batch_size: texts of one pass.
        """
        requests = self.requests(texts, question=question)
        self.prompter.fill(requests, new_tokens=0)
        return routes(self._gates(requests, batch_size), self.tasks, self.rows_TN)

    def answer(
        self,
        texts: str | Sequence[str],
        *,
        question: Names = None,
        task: Names = None,
        max_new_tokens: int | None = None,
        batch_size: int = 8,
    ) -> list[Answer]:
        """Greedy answers, as the bank's accuracy was measured.

        Args:
            texts: plain texts; the prompt is put around them: the bank's, or the task's where one is named.
            question: asked of the text, for one or each.
            task: use this task's row and prompt instead of the router, for all or (None: route) for each.
            max_new_tokens: longest answer; default: what the bank's tasks need.
            batch_size: texts of one pass.
        """
        requests = self.requests(texts, question=question, task=task)
        named = {request.task for request in requests}
        steps = max_new_tokens or max(map(self.prompter.answer_limit, named), default=1)
        self.prompter.fill(requests, new_tokens=steps)
        made: dict[int, Answer] = {}
        for batch in batches(requests, batch_size):
            state, gate_BT = self.prefill(batch)
            with torch.no_grad(), routed_by(self._router):
                outputs = self.decoder.greedy(state, steps, bool)
            found = routes(gate_BT, self.tasks, self.rows_TN)
            for request, (tokens, ended), route in zip(batch, outputs, found, strict=True):
                made[request.place] = Answer(self.prompter.decode(tokens), ended, route)
        return [made[place] for place in range(len(requests))]

    def predict(self, texts: str | Sequence[str], **options: Any) -> list[str]:
        """``answer``, the texts alone."""
        return [answer.text for answer in self.answer(texts, **options)]

    def classify(
        self,
        texts: str | Sequence[str],
        labels: Sequence[str] | None = None,
        *,
        task: Names = None,
        question: Names = None,
        batch_size: int = 8,
    ) -> list[Classification]:
        """The most likely label of each text.

        Without ``labels`` and ``task`` the router chooses a task by the text alone, and its labels are ranked behind
        its own prompt, with the gate that chose it.

        Args:
            texts: plain texts.
            labels: to choose from, for all texts; default: those of the task.
            task: named by the caller, for all or (None: route) for each.
            question: asked of the text, in place of the task's own.
            batch_size: texts of one pass.

        Raises:
            UserError: a named task has free-text answers or is not described, an unknown task, labels that are the
                same to the tokenizer.
        """
        requests = self.requests(texts, question=question, task=task)
        if labels is not None:
            if not labels:
                raise UserError("labels: found none, expected at least one (or leave them out: those of the task)")
            for request in requests:
                request.labels = tuple(dict.fromkeys(labels))
        return self.classified(requests, batch_size)

    def classified(self, requests: Sequence[Request], batch_size: int) -> list[Classification]:
        """``classify`` for requests of different callers: each may have labels, a task and a question of its own."""
        self._choose_labels([request for request in requests if request.labels is None], batch_size)
        ranked = [request for request in requests if request.labels]
        texts_of_labels = {label for request in ranked for label in request.labels or ()}
        longest = max(map(len, self.prompter.labels(sorted(texts_of_labels))), default=0)
        self.prompter.fill(ranked, new_tokens=longest + 1)
        made: dict[int, Classification] = {}
        for request in requests:
            if not request.labels and request.gate is not None:
                route = routes(request.gate[None], self.tasks, self.rows_TN)[0]
                made[request.place] = Classification(None, request.task, {}, route)
        for batch in batches(ranked, batch_size):
            made |= self._ranked(batch, batch_size)
        return [made[place] for place in range(len(requests))]

    # ---- other shapes of the same bank ------------------------------------------------------------------------

    def use_tasks(self, tasks: Sequence[str]) -> AMLoRAModel:
        """A model that routes over these tasks only, as if the bank held no other; this one stays as it is.

        Both share weights, and can be used at the same time.

        Raises:
            UserError: no task, an unknown one, or a bank whose layers weigh the adapters themselves.
        """
        if not tasks or (unknown := [task for task in tasks if task not in self.tasks]):
            found = f"unknown {unknown}" if tasks else "none"
            raise UserError(f"use_tasks: found {found}, expected some of {', '.join(self.tasks)}")
        router = self.mixture.router
        if not isinstance(router, SwitchRouter):
            raise UserError("use_tasks: the layers of this bank weigh the adapters themselves (router kind literal)")
        other = copy.copy(self)
        other._router = OnlyTasks(router.inner, sorted({self.tasks.index(task) for task in tasks}))
        return other

    def to_peft(self, task: str) -> Any:
        """A stock ``peft.PeftModel``, on a base model of its own, that computes what this bank does for ``task``.

        The task's row, its recipe included, becomes one LoRA of the ranks of all adapters it uses.

        Raises:
            UserError: no such task, or PEFT is not installed.
        """
        from amlora_dist.registry.exports import write_row

        try:
            from peft import PeftModel
        except ImportError as error:
            raise UserError("to_peft needs PEFT: pip install peft") from error
        dtype = next(self.transformer.parameters()).dtype
        with tempfile.TemporaryDirectory(prefix="amlora-peft-") as aside:
            folder = write_row(Path(aside) / "adapter", self.bank, task)
            model = PeftModel.from_pretrained(load_model(self.base, dtype=dtype), folder)
        return model.to(self.device).eval()

    @torch.no_grad()
    def next_token_logits(self, texts: Sequence[str], gate_BT: Tensor | None = None, batch_size: int = 8) -> Tensor:
        """Scores of the first token of each answer, (B, vocabulary) fp32 on the CPU; what exports are compared by.

        Args:
            texts: plain texts, behind the bank's prompt.
            gate_BT: weights of the tasks for each text; default: the router's.
            batch_size: texts of one pass.
        """
        requests = self.requests(texts)
        for request in requests:
            request.gate = None if gate_BT is None else gate_BT[request.place].to(self.device)
        self.prompter.fill(requests, new_tokens=1)
        found: dict[int, Tensor] = {}
        for batch in batches(requests, batch_size):
            state, _ = self.prefill(batch)
            found |= {request.place: row for request, row in zip(batch, state.logits.float().cpu(), strict=True)}
        return torch.stack([found[place] for place in range(len(requests))])

    # ---- inside -----------------------------------------------------------------------------------------------

    def requests(self, texts: str | Sequence[str], *, question: Names = None, task: Names = None) -> list[Request]:
        listed = [texts] if isinstance(texts, str) else list(texts)
        questions, tasks = _each("question", question, len(listed)), _each("task", task, len(listed))
        pairs = enumerate(zip(listed, questions, tasks, strict=True))
        return [Request(place, text, asked, named, gate=self._row(named)) for place, (text, asked, named) in pairs]

    def _row(self, task: str | None) -> Tensor | None:
        """The gate of a task that was named."""
        if task is None:
            return None
        if task not in self.tasks:
            self.prompter.entry(task)  # says which tasks there are
        return self.mixture.one_hot(self.tasks.index(task), 1)[0]

    def _choose_labels(self, requests: Sequence[Request], batch_size: int) -> None:
        """Give every request the labels of its task; of the task that the router chooses, where none is named."""
        for task in {request.task for request in requests if request.task is not None}:
            self.labels_of(task)
        routed = [request for request in requests if request.task is None]
        if routed:
            self.prompter.fill(routed, new_tokens=0)
            gate_BT = self._gates(routed, batch_size)
            found = routes(gate_BT, self.tasks, self.rows_TN)
            for request, gate_T, route in zip(routed, gate_BT, found, strict=True):
                request.gate, request.task = gate_T, route.task
        for request in requests:
            labels = None if request.task is None else self.prompter.entry(request.task).labels
            request.labels = None if labels is None else tuple(labels)

    @torch.no_grad()
    def _gates(self, requests: Sequence[Request], batch_size: int) -> Tensor:
        """The router's gates (B, T), on the model's device, by a partial pass."""
        router = self._router or self.mixture.router
        made: dict[int, Tensor] = {}
        for batch in batches(requests, batch_size):
            if router is None:
                gate_BT = self.prefill(batch)[1].to(self.device)
            elif router.needs_features:
                inputs = tensors(batch, **self._collation)
                positions = prompt_positions(
                    self.transformer, inputs["attention_mask"], encoder_decoder=self.base.encoder_decoder
                )
                features = self.mixture.routing_features(**(inputs | positions))  # type: ignore[arg-type]
                gate_BT = router.gates(features, len(batch))
            else:
                gate_BT = router.gates(None, len(batch))
            made |= {request.place: row for request, row in zip(batch, gate_BT, strict=True)}
        return torch.stack([made[request.place] for request in requests])

    @torch.no_grad()
    def prefill(self, batch: Sequence[Request]) -> tuple[Prefilled, Tensor]:
        """One pass over the prompts of a batch: what decoding goes on from, and the gate (B, T) that was used."""
        inputs = tensors(batch, **self._collation)
        routing: dict[str, Any] = {"prompt_mask": inputs["prompt_mask"]}
        noted: list[Tensor] = []
        selected: list[Tensor] = []
        given = [request.gate for request in batch]
        router = self._router
        if all(gate is not None for gate in given):
            routing["task_gate"] = torch.stack([gate for gate in given if gate is not None])
            noted.append(routing["task_gate"])
        elif self.mixture.router is not None:
            routing["on_route"] = lambda _features, gate_BT: noted.append(gate_BT)
            if any(gate is not None for gate in given):
                bank_router = self.mixture.router
                inner = bank_router.inner if isinstance(bank_router, SwitchRouter) else bank_router
                router = SomeGiven(router or inner, given)
        else:
            mask_BS = inputs["prompt_mask"]
            routing["on_select"] = lambda _path, selection: selected.append(mean_over_prompt(selection.weights, mask_BS))
        with routed_by(router):
            state = self.decoder.prefill(inputs["input_ids"], inputs["attention_mask"], **routing)
        return state, noted[0] if noted else torch.stack(selected).mean(dim=0)

    def _ranked(self, batch: Sequence[Request], batch_size: int) -> dict[int, Classification]:
        """One pass over all prompts; then the labels of each set behind the rows that have it."""
        state, gate_BT = self.prefill(batch)
        found = routes(gate_BT, self.tasks, self.rows_TN)
        longest = max(len(request.tokens) for request in batch)
        sets: dict[tuple[str, ...], list[int]] = {}
        for row, request in enumerate(batch):
            sets.setdefault(request.labels or (), []).append(row)
        made: dict[int, Classification] = {}
        for names, rows in sets.items():
            plan = plan_labels(self.prompter.labels(names), self.decoder.eos_id)
            part = state if len(rows) == len(batch) else picked(state, rows)
            with torch.no_grad(), routed_by(self._router):
                passes = contexts_per_pass(longest, batch_size, plan)
                scores_BL = self.decoder.label_scores(part, plan, contexts_per_pass=passes)
            shares, best = torch.softmax(scores_BL, dim=-1).tolist(), scores_BL.argmax(dim=-1).tolist()
            for row, share, winner in zip(rows, shares, best, strict=True):
                scores = dict(zip(names, share, strict=True))
                made[batch[row].place] = Classification(names[winner], batch[row].task, scores, found[row])
        return made

    @property
    def _collation(self) -> dict[str, Any]:
        return {
            "pad_id": self.decoder.pad_id, "encoder_decoder": self.base.encoder_decoder, "device": self.device
        }  # fmt: skip


def _each(name: str, given: Names, count: int) -> list[str | None]:
    """One value for each text."""
    if given is None or isinstance(given, str):
        return [given] * count
    values = list(given)
    if len(values) != count:
        raise UserError(f"{name}: found {len(values)} for {count} texts, expected one for all or one for each")
    return values
