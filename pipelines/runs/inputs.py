"""What a run is made of before anything trains: its tasks' rows, its base model, and everything wrong with them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from amlora_dist.adapters.keys import KEYS_RULE
from amlora_dist.adapters.settings import RouterSettings
from amlora_dist.base_model import BaseModel, load_tokenizer, resolve_base, settled_attention
from amlora_dist.config.former_values import unlike_former
from amlora_dist.config.loading import RunConfig, home, storage_of
from amlora_dist.digests import value_digest
from amlora_dist.errors import UserError
from amlora_dist.evaluation.settings import AnswerSettings
from amlora_dist.fingerprints import prompt_values, scoring_fingerprint, training_fingerprint
from amlora_dist.methods import excluded, method_class, method_for
from amlora_dist.methods.base import adapter_reads
from amlora_dist.methods.kinds import Stages, Trains
from amlora_dist.privacy import public_name
from amlora_dist.tasks import background
from amlora_dist.tasks.chat import settled
from amlora_dist.tasks.prompt_format import DEFAULT_TEXT_TOKENS, PromptFormat
from amlora_dist.tasks.prompts import template_for
from amlora_dist.tasks.sources import TaskData, load_task
from amlora_dist.tasks.task import TaskSpec, resolve_task
from amlora_dist.training.settings import StageSettings
from amlora_dist.training.stage_spec import WITHOUT, Cell, Mode
from pipelines.cluster.resources import Demand
from pipelines.runs.model_checks import check_model, check_packing
from pipelines.runs.plain_choice import dev_rows

if TYPE_CHECKING:
    from amlora_dist.methods.base import Method
    from amlora_dist.tasks.sources import Row


@dataclass(slots=True)
class RunInputs:
    """Tasks with their rows, and the base model, all checked."""

    config: RunConfig
    base: BaseModel
    specs: dict[str, TaskSpec]
    """The tasks of the sequence, in order, and after them the test sets that are only scored."""
    data: dict[str, TaskData]
    dtype: str
    run_id: str = ""
    """Of the run; empty where rows and model are looked at without one."""
    parameters: int = 0
    """Of the base model."""
    trainable: int = 0
    """Of the adapter that a stage trains."""
    rate: dict[str, Any] | None = None
    """How ``training.learning_rate: auto`` was settled, once it is; None where a number was given."""
    dev: dict[str, TaskData] = field(default_factory=dict)
    """Dev rows of tasks, where they decide how plain text is answered (``plain_choice``)."""

    @property
    def model(self) -> str:
        """The registered model of its versions."""
        return self.config.registered_model or self.run_id

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks of the sequence."""
        return list(self.specs)[: len(self.config.tasks)]

    @property
    def also(self) -> list[str]:
        """Names of the test sets that no stage learns."""
        return list(self.specs)[len(self.config.tasks) :]

    @property
    def method(self) -> Method:
        """The method with the run's settings."""
        return method_for(self.stage_settings())

    @property
    def stage_names(self) -> list[str]:
        """Names of the stages: the tasks, for most methods."""
        return self.method.stages.names(self.tasks, self.config.method)

    @property
    def storage(self) -> Path:
        """Folder of stages, scores and what is cached of them."""
        return storage_of(self.config)[0]

    @property
    def url(self) -> str | None:
        """Where what is finished is copied to, if nodes share no folder."""
        return storage_of(self.config)[1]

    @property
    def cache(self) -> Path:
        """Folder of files that may be deleted at any time."""
        return (self.storage if self.config.storage is not None and self.url is None else home()) / "cache"

    def stage_settings(self) -> StageSettings:
        """The part of the configuration that stages read."""
        return self.config.stage_settings()

    @property
    def prompt_format(self) -> PromptFormat:
        """How prompts become ids."""
        return self.stage_settings().prompt_format

    def demand(self, gpu_share: float = 1.0) -> Demand:
        """What the run needs at least."""
        c = self.config
        fewest = c.workers if c.min_workers is None else c.min_workers
        return Demand(
            fewest, self.parameters, self.trainable, len(self.specs), self.dtype, c.zero_stage, gpu_share,
            keeps_best=c.training.keep == "best", quantisation=c.model.quantisation,
        )  # fmt: skip

    def prompt(self, task: str) -> dict[str, Any]:
        """What turns this task's rows into token ids, for fingerprints."""
        spec = self.specs[task]
        template = template_for(spec, spec.prompt_style)
        values = prompt_values(template.digest, int(spec.max_length or 0), self.base.encoder_decoder)
        if not self.prompt_format.text_alone:
            return values
        # Whoever is routed to this task is answered by its prompt and labels, so they are part of what a bank is.
        labels = {} if spec.free_text else {"labels": spec.label_texts}
        if spec.chat:
            settings = spec.prompt
            values |= {"chat": {"train_on": settings.train_on or "last", "system": settings.system}}
        return values | self.prompt_format.values() | labels

    def mixed_rows(self, stage: str, sequence: list[str]) -> dict[str, int]:
        """How many rows of the next task are among a stage's own, by task (``boundary_mix``)."""
        share, later = self.config.boundary_mix, sequence[sequence.index(stage) + 1 :]
        if not share or stage not in self.data or not later:
            return {}
        return {later[0]: round(len(self.data[stage].rows["train"]) * share / (1 - share))}

    def training_fingerprint(
        self,
        method: Method,
        stage: int,
        task: str,
        adapters: list[str],
        statistics: list[str],
        rows: dict[str, int | None],
        mixed: dict[str, int] | None = None,
    ) -> str:
        """Of the stage that learns ``task`` on top of adapters with these digests, from ``rows`` (``Method.rows``) with
        so many rows of other tasks ``mixed`` among its own."""
        return self._stage_fingerprint(method.reads(stage), task, adapters, statistics, rows, mixed)

    def adapter_fingerprint(
        self, method: Method, stage: int, task: str, adapters: list[str], rows: dict[str, int | None],
        mixed: dict[str, int] | None = None,
    ) -> str | None:  # fmt: skip
        """Of the stage's adapter alone; arguments as of ``training_fingerprint``. None where it has none of its own."""
        reads = adapter_reads(method, stage)
        return None if reads is None else self._stage_fingerprint(reads, task, adapters, [], rows, mixed)

    def _stage_fingerprint(
        self, reads: dict[str, Any], task: str, adapters: list[str], statistics: list[str], rows: dict[str, int | None],
        mixed: dict[str, int] | None,
    ) -> str:  # fmt: skip
        if mixed:
            reads["mixed"] = {
                name: {"count": count, "rows": self.data[name].digest("train"), "prompt": self.prompt(name)}
                for name, count in mixed.items()
            }
        if list(rows) != [task]:
            reads["rows"] = {
                name: {"at_most": limit, "rows": self.data[name].digest("train"), "prompt": self.prompt(name)}
                for name, limit in rows.items()
            }
        own = task in rows
        return training_fingerprint(
            base_digest=self.base.identity,
            parent_adapters=adapters,
            parent_statistics=[] if self.prompt_format.text_alone else statistics,
            task=task,
            rows_digest=self.data[task].digest("train") if own else "",
            prompt=self.prompt(task) if own else {},
            method=self.config.method,
            seed=self.config.seed,
            reads=reads,
        )

    def scoring_fingerprint(self, method: Method, bank: list[str], mode: str, task: str) -> str:
        """Of one cell, under a bank whose stages have these training fingerprints."""
        router = self._weighing(self.config.router) if _routes(mode) and method.routed else {}
        if self.plain_texts and mode != "untrained":
            router |= {"prompts": "served", "answer": asdict(self.config.answer), "keys_rule": KEYS_RULE}
            router |= {key: getattr(self.config.router, key) for key in ("keys", "shrinkage")}
            router |= unlike_former("router", {"label_keys": self.config.router.label_keys})
            if self.config.router.gate.abstention:
                router |= {"background": background.digest()}
            free = [name for name in self.tasks[: len(bank)] if self.specs[name].free_text]
            router |= {f"answer of {name}": self.specs[name].max_answer_tokens for name in free if name != task}
            router |= self._cut_with_others(method, bank, mode, task)
        reuse = {} if self.config.evaluation.reuse else {"reuse": False}
        return self._scoring(bank, mode, router | reuse, task)

    @staticmethod
    def finds_tasks(method: Method) -> bool:
        """Whether its bank finds the task of a plain text by itself, and answers by that task's prompt and labels."""
        settings = method.settings
        plain = settings.prompt_format.text_alone and settings.router.kind == "posterior"
        return plain and method.routed and not method.layers.selects

    def _cut_with_others(self, method: Method, bank: list[str], mode: str, task: str) -> dict[str, int]:
        """Most tokens of a prompt of a bank without keys, whose one prompt has room for the longest of its tasks; nothing
        where that is the task's own."""
        if mode in ("oracle", "own") or method.stages is Stages.APART or self.finds_tasks(method):
            return {}
        learned = self.tasks if method.stages is Stages.ONE else self.tasks[: len(bank)]
        own = int(self.specs[task].max_length or DEFAULT_TEXT_TOKENS)
        most = max((int(self.specs[name].max_length or DEFAULT_TEXT_TOKENS) for name in learned), default=own)
        return {} if most == own else {"max_length": most}

    def cell(
        self, method: Method, storage: Path, mode: Mode, task: str, bank: list[str], before: str | None = None
    ) -> Cell:
        """One cell to score; ``before`` is the scoring fingerprint of the same rows under other gates."""
        fingerprint = self.scoring_fingerprint(method, bank, mode, task)
        features = self.features_fingerprint(method, task)
        alike = [] if features is None or mode == "untrained" else [before, self.scored_by_default(bank, task)]
        scores = storage / "scores"
        return Cell(
            task,
            self.config.evaluation.split,
            mode,
            fingerprint,
            folder=str(scores / fingerprint),
            before=tuple(str(scores / one) for one in alike if one not in (None, fingerprint)),
            features=None if features is None else str(storage / "features" / f"{features}.safetensors"),
        )

    @property
    def plain_texts(self) -> bool:
        """Whether rows are scored as plain texts, by what serves them, where the method's router can."""
        return self.prompt_format.text_alone and self.config.evaluation.prompts == "served"

    def _weighing(self, router: RouterSettings) -> dict[str, Any]:
        """What of a router's settings decides its gates."""
        return {"kind": router.kind, **unlike_former("router.gate", asdict(router.gate))}

    def scored_by_default(self, bank: list[str], task: str) -> str:
        """Of the cell of this bank and task under the default router: a run that varies the gates of another's bank differs
        from it in few rows."""
        router = self._weighing(RouterSettings())
        if self.plain_texts:
            router |= {"prompts": "served", "answer": asdict(AnswerSettings()), "keys_rule": KEYS_RULE}
            router |= {key: getattr(RouterSettings(), key) for key in ("keys", "shrinkage")}
            router |= unlike_former("router", {"label_keys": RouterSettings().label_keys})
        return self._scoring(bank, "router", router, task)

    def _scoring(self, bank: list[str], mode: str, router: dict[str, Any], task: str) -> str:
        spec, split = self.specs[task], self.config.evaluation.split
        return scoring_fingerprint(
            bank=[self.base.identity] if mode == "untrained" else bank,
            mode=mode,
            router=router,
            task=task,
            split=split,
            rows_digest=self.data[task].digest(split),
            prompt=self.prompt(task) | ({"answer": spec.max_answer_tokens} if spec.free_text else {}),
            metric=str(spec.metric),
            labels=spec.label_texts,
            dtype=self.dtype,
        )

    def features_fingerprint(self, method: Method, task: str) -> str | None:
        """Of what the router reads of a task's rows; None where no score of them can hold for a later bank too."""
        changing = method.layers.selects or "caches" in excluded(self.config.method)
        if not self.config.evaluation.reuse or method.stages is not Stages.CHAINED or changing:
            return None
        router = self.config.router
        read: dict[str, Any] = {"layer": router.layer, "skip_tokens": router.skip_tokens}
        if self.prompt_format.text_alone:
            read |= {"depths": router.depths}
        read |= {"batch": self.config.evaluation.batch_size, "attention": self.config.model.attention}
        return value_digest({"rows": self._scoring([], "untrained", {}, task), **read})

    def facts(self) -> dict[str, Any]:
        """What a report says of the model and the rows, JSON-able."""
        return {
            "base": {"source": public_name(self.base.source), "revision": self.base.revision, "digest": self.base.digest},
            "dtype": self.dtype,
            "tasks": {name: self._task_facts(name) for name in self.specs},
        }

    def _task_facts(self, name: str) -> dict[str, Any]:
        spec, data = self.specs[name], self.data[name]
        return {
            "labels": spec.label_texts,
            "metric": spec.metric,
            "prompt": self.prompt(name),
            "prompt_style": "its own template" if spec.prompt.template else spec.prompt_style,
            "leaks": spec.leaks,
            "rows": {split: len(rows) for split, rows in data.rows.items()},
            "digests": {split: data.digest(split) for split in data.rows},
            "bad_rows": len(data.bad),
            **({"columns": data.took} if data.took else {}),
            **({"format": spec.prompt.format} if spec.prompt.format else {}),
        }


def gather_inputs(config: RunConfig, place: Path, *, run_id: str = "", gpus: bool | None = None) -> RunInputs:
    """Read and check everything that can be checked before a process is started.

    Args:
        config: of the run.
        place: ``AMLORA_HOME``.
        run_id: of the run, if there is one; names its registered model where the configuration does not.
        gpus: whether stages run on GPUs, which decides what ``auto`` means; None: as this process would.

    The configuration of what it returns has ``auto`` of ``dtype`` and ``model.attention`` replaced by what it means, and the
    evidence that a method of keys alone has.

    Raises:
        UserError, FaultsError: a task, a row, the model or a target module is wrong; names which and the fix.
    """
    attention = settled_attention(config.model.attention, gpu=_gpu() if gpus is None else gpus)
    config = replace(config, dtype=_dtype(config.dtype, gpus), model=replace(config.model, attention=attention))
    config = replace(config, registered_model=config.registered_model or run_id or None)
    config = with_evidence(config)
    specs: dict[str, TaskSpec] = {}
    data: dict[str, TaskData] = {}
    base: BaseModel | None = None
    for number, ref in enumerate([*config.tasks, *config.evaluation.also]):
        spec = resolve_task(ref, data_dir=config.data_dir, base_dir=Path.cwd(), defaults=config.task_defaults)
        if spec.name in specs:
            raise UserError(f"tasks: two tasks are named {spec.name!r}; give one another `name`")
        specs[spec.name] = spec
        try:
            template_for(spec, spec.prompt_style)
        except UserError as error:
            raise UserError(f"{spec.origin}: {error}") from error
        if spec.open_format or spec.chat:
            base = resolve_base(config.model, place) if base is None else base
            spec = specs[spec.name] = settled_format(spec, base, config.prompt_format)
        splits = ("train", config.evaluation.split) if number < len(config.tasks) else (config.evaluation.split,)
        data[spec.name] = load_task(
            spec, seed=config.seed, data_dir=config.data_dir, splits=splits, sealed=config.evaluation.sealed
        )
        specs[spec.name] = data[spec.name].spec  # with the labels that `labels: auto` found
    for spec in list(specs.values())[: len(config.tasks)]:
        for other in paraphrased(spec, config.evaluation.paraphrases):
            specs[other.name], data[other.name] = other, data[spec.name]
    base = resolve_base(config.model, place) if base is None else base
    if config.training.cache_trunk and base.encoder_decoder:
        raise UserError("training.cache_trunk: found true with an encoder-decoder model, expected false: decoders only")
    if config.training.packing:
        check_packing(base)
    inputs = RunInputs(config, base, specs, data, config.dtype, run_id)
    method = method_for(inputs.stage_settings())
    tasks = [(spec, _first_rows(data[name])) for name, spec in specs.items()]
    inputs.parameters, inputs.trainable, depths = check_model(method, base, tasks)
    if config.prompt_format == 2:
        longest = max(int(spec.max_length or DEFAULT_TEXT_TOKENS) for spec in specs.values())
        router = replace(
            config.router,
            depths=depths if config.router.depths is None else config.router.depths,
            max_text_tokens=config.router.max_text_tokens or longest,
        )
        inputs.config = replace(inputs.config, router=router)
    inputs.dev = dev_rows(inputs, method)
    return inputs


def with_evidence(config: RunConfig) -> RunConfig:
    """The configuration with the evidence that its method has: one of keys alone answers by them, whatever is asked."""
    if method_class(config.method).trains is not Trains.STATISTICS:
        return config
    return replace(config, answer=replace(config.answer, evidence="keys"))


def settled_format(spec: TaskSpec, base: BaseModel, prompt_format: int) -> TaskSpec:
    """The task with the format of its prompts decided by the model's tokenizer."""
    if prompt_format != 2:
        if spec.chat:
            raise UserError(f"{spec.origin}: prompt.format: found chat in a run with prompt_format 1, expected classic")
        return replace(spec, prompt=replace(spec.prompt, format="classic"))
    tokenizer = None if base.encoder_decoder and not spec.chat else load_tokenizer(base.path)
    return settled(spec, tokenizer, encoder_decoder=base.encoder_decoder)


def paraphrased(spec: TaskSpec, count: int) -> list[TaskSpec]:
    """The task with at most ``count`` paraphrases of its question, each under a name of its own, with the same rows."""
    questions = spec.prompt.paraphrases[:count]
    source = replace(spec.source, mirror=spec.source.mirror or spec.name)
    return [
        replace(spec, name=f"{spec.name}.paraphrase{n}", source=source, prompt=replace(spec.prompt, question=question))
        for n, question in enumerate(questions, start=1)
    ]


def _first_rows(data: TaskData) -> list[Row]:
    """One row of each split: what their prompts have besides the text is alike in all."""
    return [row for rows in data.rows.values() for row in rows[:1]]


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _dtype(asked: Literal["auto", "fp32", "bf16"], gpus: bool | None) -> Literal["fp32", "bf16"]:
    if asked != "auto":
        return asked
    if gpus is not None:
        return "bf16" if gpus else "fp32"
    import torch

    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"


def _routes(mode: str) -> bool:
    return mode in ("router", "own") or mode.startswith(WITHOUT)
