"""What an application holds: a bank in its base model, ready to route, answer and classify.

::

    model = AMLoRAModel.from_bank("models:/demo@champion")
    for found in model.classify(["My invoice is wrong"]):
        print(found.label, found.route.task)

A pulled folder needs neither MLflow nor Ray nor DeepSpeed.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amlora_dist.adapters.inject import Mixture
from amlora_dist.adapters.keyed_router import KeyedRouter
from amlora_dist.adapters.router import Router
from amlora_dist.adapters.router_override import OverridableRouter, SubsetRouter, routed_by
from amlora_dist.base_model import BaseModel, load_model, load_tokenizer
from amlora_dist.errors import UserError
from amlora_dist.evaluation.answering import Answering
from amlora_dist.evaluation.decoding import Decoder, Prefilled
from amlora_dist.evaluation.plain_texts import PlainLabels
from amlora_dist.evaluation.ranking import finished
from amlora_dist.evaluation.requests import (
    Answer,
    Classification,
    Prompter,
    Request,
    Route,
    RouteBy,
    TextOrTurns,
    check_counts,
    mean_rows,
)
from amlora_dist.inference.loading import (
    answer_settings,
    bank_format,
    check_description,
    check_quantisation,
    chosen_attention,
    chosen_device,
    chosen_dtype,
    inject_bank,
    pulled,
    resolve_bank_base,
    sharing_copy,
    warn_of_former,
)
from amlora_dist.inference.prompt_answering import PromptAnswering
from amlora_dist.inference.routed_prompts import RoutedPrompt, by_prompt, by_text
from amlora_dist.quantisation import Quantisation
from amlora_dist.registry.bank_folder import Bank
from amlora_dist.registry.signing import Trust
from amlora_dist.tasks.conversations import Turn, messages_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["AMLoRAModel", "Answer", "Classification", "Route"]

Texts = str | Mapping[str, str] | Sequence[TextOrTurns]
"""One text (or its fields by name), or several, conversations among them."""
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
        manifest = bank.manifest
        self.prompter = Prompter(
            {line.task: line.task_spec for line in manifest.adapters}, manifest.bank_template, tokenizer,
            encoder_decoder=manifest.base.encoder_decoder, positions=positions, prompt_format=bank_format(manifest),
            prefix=mixture.layers.prefix, learned=manifest.learned,
        )  # fmt: skip
        self.decoder = Decoder(
            transformer,
            pad_id=int(tokenizer.pad_token_id),
            eos_id=int(tokenizer.eos_token_id),
            encoder_decoder=base.encoder_decoder,
        )
        router = mixture.router.inner if isinstance(mixture.router, OverridableRouter) else mixture.router
        keyed = isinstance(router, KeyedRouter) and not mixture.routing.select
        plain = PlainLabels() if keyed else PlainLabels.of(self.prompter, way=manifest.way)
        self.former = PromptAnswering(mixture, self.decoder, self.prompter, self.rows_TN, plain)
        """What answers where ``answering`` is None, and reads raw prompts."""
        warn_of_former(self.prompter.format, uri or f"bank of run {manifest.run_id!r}")
        self.answering: Answering | None = None
        """What banks answer by whose router has keys for plain text; None for the others, and for banks before 0.2."""
        if isinstance(router, KeyedRouter) and keyed:
            answer = answer_settings(manifest)
            beta = None if answer.beta == "calibrated" else float(answer.beta)
            self.answering = Answering(
                mixture, self.decoder, self.prompter, router,
                kind=answer.evidence, beta=beta, device=mixture.device, rows_TN=self.rows_TN,
            )  # fmt: skip

    @classmethod
    def from_bank(
        cls,
        bank: str | Path,
        *,
        base: str | Path | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        tracking_uri: str | None = None,
        share_base_with: AMLoRAModel | None = None,
        require_signature: str | Path | None = None,
        expect_digest: str | None = None,
        abstain: float | None = None,
        quantisation: Quantisation | None = None,
    ) -> AMLoRAModel:
        """Load a bank and its base model.

        Args:
            bank: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, or the folder of a bank. A version is pulled once
                to ``AMLORA_HOME/banks``.
            base: folder or Hub id of the base model, where it is not at the place that the bank names.
            device: default: the first GPU, or the CPU.
            dtype: ``fp32``, ``bf16``, ``fp16`` or a torch dtype; default: bf16 where the device has it, else fp32.
            tracking_uri: MLflow that has the version; default: the store in ``AMLORA_HOME``.
            share_base_with: a model in use, whose base model's weights are shared instead of loaded again where both banks
                have the same base model; ``device`` and ``dtype`` are then its own.
            require_signature: PEM file of the public key that must have signed the whole bank.
            expect_digest: of its manifest, as ``amlora verify`` prints it.
            abstain: share of its own rows that the bank may lose by giving texts of no task to the base model; 0: it takes
                every text for its own; default: as it was published.
            quantisation: ``none``, ``nf4`` or ``int8``, of the base model; default: the one that the bank was trained on.
                With another one it answers otherwise than it was measured.

        Raises:
            UserError: no such version or folder; the base model is not there, or is another one than the bank was
                trained on (by digest); its quantisation needs a package that is not installed.
            BankError: the bank is damaged.
        """
        uri: str | None = None
        trust = Trust.of(require_signature, expect_digest)
        if str(bank).startswith("models:"):
            uri, folder = pulled(str(bank), tracking_uri, trust)
        else:
            folder = Path(bank).expanduser()
        loaded = trust.read(folder, statistics=False)
        check_description(loaded, abstain)
        check_quantisation(loaded.manifest.base, quantisation)
        found = resolve_bank_base(loaded.manifest.base, base, quantisation)
        if share_base_with is not None and share_base_with.base.identity == found.identity:
            plain = share_base_with._plain
        else:
            where = chosen_device(device)
            attention = chosen_attention(loaded.manifest, where)
            plain = load_model(found, dtype=chosen_dtype(dtype, where), attention=attention, device=where)
            plain.to(where)
        transformer = sharing_copy(plain)
        tokenizer = load_tokenizer(found.path)
        mixture = inject_bank(transformer, loaded, eos_id=int(tokenizer.eos_token_id), abstain=abstain)
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
        return self.prompter.labels_of(task)

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

    def route(self, texts: Texts, *, question: Names = None, batch_size: int = 16) -> list[Route]:
        """Which tasks and adapters each text would use, and how strongly; a pass through half of the model's depth.

        Args:
            texts: plain texts, fields by name or conversations, as for ``answer``; the text alone is read.
            question: for one or each; changes a route only where the bank's router reads whole prompts (no keys for text).
            batch_size: texts of one pass.
        """
        requests = self.requests(texts, question=question)
        if self.answering is not None:
            return self.answering.routed(requests, batch_size=batch_size, router=self._keyed)
        return self.former.routed(requests, batch_size, self._router)

    def prompts(self, texts: Texts, *, free: bool = False, batch_size: int = 16) -> list[RoutedPrompt]:
        """How each text is routed, what is read of it and how its labels are weighed (``free``: none are), as ``answer``
        does it: for engines that have the bank's adapters but not its router (``serving.remote_answers``)."""
        check_counts(batch_size)
        requests = self.requests(texts)
        for request in requests:
            request.free = free
        if self.answering is None:
            self.former.prepare(requests)
            return by_prompt(self.former, requests, batch_size, self._router)
        starts = range(0, len(requests), batch_size)
        return [one for n in starts for one in by_text(self.answering, requests[n : n + batch_size], self._keyed)]

    def answer(
        self,
        texts: Texts,
        *,
        question: Names = None,
        task: Names = None,
        max_new_tokens: int | None = None,
        free: bool = False,
        batch_size: int = 8,
    ) -> list[Answer]:
        """Answers to plain texts, as ``evaluation.prompts: served`` scores them (prompt format 1 was scored otherwise): a
        label's words where the routed task has labels (without keys: the best of all), else what the model writes.

        Args:
            texts: plain texts, their fields by name (``{"premise": ..., "hypothesis": ...}``, joined as the task's rows are)
                or conversations (lists of messages); the prompt of the routed or named task is put around.
            question: asked of the text in place of the task's own, for one or each.
            task: use this task's row and prompt instead of the router, for all or (None: route) for each.
            max_new_tokens: longest answer that is written; default: what the task needs.
            free: write, whatever the task.
            batch_size: texts of one pass.
        """
        check_counts(batch_size, max_new_tokens)
        requests = self.requests(texts, question=question, task=task)
        for request in requests:
            request.free, request.new_tokens = free, max_new_tokens or None
        if self.answering is not None:
            work = self.answering.answering(requests, batch_size=batch_size, router=self._keyed, shares=False)
            return [Answer(one.text, one.ended, one.route) for one in finished(work)]
        return self.former.answered(requests, batch_size, self._router)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any] | Turn],
        *,
        task: str | None = None,
        route_by: RouteBy = "turn",
        max_new_tokens: int | None = None,
        free: bool = False,
    ) -> Answer:
        """The assistant's next turn of a conversation, as ``/v1/chat/completions`` answers it.

        Args:
            messages: ``{"role": "user", "content": "..."}`` and so on, the user's last; roles system, user, assistant, tool.
            task: use this task's row and prompt instead of the router.
            route_by: ``turn``: the user's last turn decides the route, again in every turn; ``conversation``: their
                first one does, so that a conversation keeps its route.
            max_new_tokens: longest answer that is written; default: what the task needs.
            free: write, whatever the task.

        Raises:
            UserError: what is no conversation that waits for an answer, an unknown task, no room for the prompt.
        """
        check_counts(1, max_new_tokens)
        requests = self.requests([messages_of(messages)], task=task, route_by=route_by)
        requests[0].free, requests[0].new_tokens = free, max_new_tokens or None
        if self.answering is None:
            return self.former.answered(requests, 1, self._router)[0]
        work = self.answering.answering(requests, batch_size=1, router=self._keyed)
        (found,) = finished(work)
        return Answer(found.text, found.ended, found.route)

    def predict(self, texts: Texts, **options: Any) -> list[str]:
        """``answer``, the texts alone."""
        return [answer.text for answer in self.answer(texts, **options)]

    def classify(
        self,
        texts: Texts,
        labels: Sequence[str] | None = None,
        *,
        task: Names = None,
        question: Names = None,
        batch_size: int = 8,
    ) -> list[Classification]:
        """The most likely label of each text.

        Without ``labels`` and ``task`` the router chooses a task by the text alone, and its labels are ranked behind
        its own prompt, with the gate that chose it; a bank without keys ranks the labels of all tasks.

        Args:
            texts: plain texts, fields by name or conversations, as for ``answer``.
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
            self.prompter.labels(labels)  # says which is no text
            for request in requests:
                request.labels = tuple(dict.fromkeys(labels))
        return self.classified(requests, batch_size)

    def classified(self, requests: Sequence[Request], batch_size: int) -> list[Classification]:
        """``classify`` for requests of different callers: each may have labels, a task and a question of its own."""
        return finished(self.classifying(requests, batch_size))

    @torch.no_grad()
    def classifying(self, requests: Sequence[Request], batch_size: int) -> Generator[int, None, list[Classification]]:
        """``classified`` with a stop after each pass, which yields the tokens that went through: others may run there."""
        if self.answering is not None:
            return (yield from self._classifying_keyed(self.answering, requests, batch_size))
        return (yield from self.former.classifying(requests, batch_size, self._router))

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
        if not isinstance(router, OverridableRouter):
            kind = self.bank.manifest.router.kind
            raise UserError(f"use_tasks: the layers of this bank weigh the adapters themselves (router kind {kind})")
        other = copy.copy(self)
        chosen = sorted({self.tasks.index(task) for task in tasks})
        inner = router.inner
        other.former = self.former.over(tasks)
        other._router = inner.only(chosen) if isinstance(inner, KeyedRouter) else SubsetRouter(inner, chosen)
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
        with tempfile.TemporaryDirectory(prefix="amlora-peft-") as tmp:
            folder = write_row(Path(tmp) / "adapter", self.bank, task)
            model = PeftModel.from_pretrained(load_model(self.base, dtype=dtype), folder)
        return model.to(self.device).eval()

    @torch.no_grad()
    def next_token_logits(self, texts: Sequence[str], gate_BT: Tensor | None = None, batch_size: int = 8) -> Tensor:
        """Scores of the first token of each answer, (B, vocabulary) fp32 on the CPU; what exports are compared by.

        Args:
            texts: plain texts, each behind the prompt of the task that it is routed to, whatever ``gate_BT`` says (of a bank
                without keys for plain text behind the bank's own).
            gate_BT: weights of the tasks for each text; default: the router's.
            batch_size: texts of one pass.
        """
        requests = self.requests(texts)
        for request in requests:
            request.gate = None if gate_BT is None else gate_BT[request.place].to(self.device)
        if self.answering is not None:
            return self.answering.next_token_logits(requests, batch_size=batch_size, router=self._keyed)
        return self.former.next_token_logits(requests, batch_size, self._router)

    # ---- inside -----------------------------------------------------------------------------------------------

    @property
    def _keyed(self) -> KeyedRouter | None:
        """The router in place of the bank's own, on the model's device; None for the bank's."""
        return self._router.to(self.device) if isinstance(self._router, KeyedRouter) else None

    def _classifying_keyed(
        self, answering: Answering, requests: Sequence[Request], batch_size: int
    ) -> Generator[int, None, list[Classification]]:
        for named in {request.task for request in requests if request.task is not None and request.labels is None}:
            self.labels_of(named)
        found = yield from answering.answering(requests, batch_size=batch_size, router=self._keyed, write=False)
        return [Classification(one.label, one.request.task, one.shares, one.route, one.foreign) for one in found]

    def requests(
        self, texts: Texts, *, question: Names = None, task: Names = None, route_by: RouteBy = "turn"
    ) -> list[Request]:
        """One request for each text or conversation; errors as ``chat`` and ``answer``."""
        given: Sequence[TextOrTurns] = [texts] if isinstance(texts, (str, Mapping)) else list(texts)
        questions, tasks = _each("question", question, len(given)), _each("task", task, len(given))
        made = []
        for n, (text, own, named) in enumerate(zip(given, questions, tasks, strict=True)):
            gate, one = self._row(named), self.prompter.query(text, route_by, named)
            made.append(Request(n, one.text, own or one.question, named, gate=gate, turns=one.turns, fields=one.fields))
        return made

    def prefill(
        self, batch: Sequence[Request], on_logits: Callable[[Tensor], None] | None = None
    ) -> tuple[Prefilled, Tensor]:
        """One pass over whole prompts, routed by themselves: what decoding goes on from, and the gate (B, T)."""
        return self.former.prefill(batch, self._router, on_logits)

    def chosen(self, state: Prefilled, batch: Sequence[Request]) -> list[str | None]:
        """Behind such a pass, the best label of each prompt that has some, None for the others."""
        return self.former.chosen(state, batch, self._router)

    def _row(self, task: str | None) -> Tensor | None:
        """The gate of a task that was named."""
        if task is None:
            return None
        if task not in self.tasks:
            self.prompter.entry(task)  # says which tasks there are
        return self.mixture.one_hot(self.tasks.index(task), 1)[0]


def _each(name: str, given: Names, count: int) -> list[str | None]:
    """One value for each text."""
    if given is None or isinstance(given, str):
        return [given] * count
    values = list(given)
    if len(values) != count:
        raise UserError(f"{name}: found {len(values)} for {count} texts, expected one for all or one for each")
    return values
