"""What goes over the wire: OpenAI's shapes, with a few keys more. The OpenAPI schema is made of these.

Strict: an unknown key or a number in quotes is an error that names it, not a request that means something else.
"""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from amlora_dist.serving.settings import MOST_TEXTS
from amlora_dist.serving.wire_values import (
    MOST_LABELS,
    MOST_LIKELY,
    MOST_TURNS,
    Boolean,
    Fields,
    Ignored,
    NoEntries,
    NoItems,
    Off,
    One,
    Stop,
    TagName,
    Text,
    Texts,
    TokenLists,
    Tokens,
    Words,
    Zero,
    absent,
    at_most,
    counted_prompt,
    text_or_fields,
)


class _RequestModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: object) -> object:
        if isinstance(value, dict) and len(value) > len(cls.model_fields):
            # Escaped: half of a character in a message can be written by nobody.
            unknown = islice((ascii(str(key)[:80])[1:-1] for key in value if key not in cls.model_fields), 5)
            raise PydanticCustomError(
                "extra_forbidden", "Extra inputs are not permitted, among {count} keys found: {names}",
                {"count": len(value), "names": ", ".join(unknown)},
            )  # fmt: skip
        return value


class _ResponseModel(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


# ---- asked ----------------------------------------------------------------------------------------------------


class StreamOptions(_RequestModel):
    """As OpenAI's."""

    include_usage: bool = False
    """Send the counts of tokens as the last chunk."""
    include_obfuscation: bool | None = None
    """Has no effect."""


class Writing(_RequestModel):
    """How answers are written; what both kinds of completion share."""

    model: str | None = None
    """The bank's name (the default: the router weighs its tasks), or ``NAME:TASK`` for one task's row and prompt."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Default 0: the most likely token, as free-text answers were scored. Labels are not drawn: the likeliest is given."""
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Of 0 only the most likely token is left."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """The same seed draws the same answer, on the same machine."""
    stop: Annotated[Stop | Annotated[list[Stop], Field(max_length=4, fail_fast=True)] | None, at_most(4)] = None
    """At most 4 sequences of 256 characters."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: One | None = None
    presence_penalty: Zero | None = None
    """Only 0."""
    frequency_penalty: Zero | None = None
    """Only 0."""
    logit_bias: NoEntries | None = None
    """Only empty."""
    user: Ignored | None = None
    """Has no effect."""
    routing: bool = False
    """Whether each choice carries which tasks and adapters it was routed to."""

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop sequences."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(Writing):
    """Texts to answer."""

    fields: Fields | None = None
    """The parts of one text by name, in place of ``prompt``: joined as the rows were that the task learned, and routed by
    what they say. Never raw. A text without words next to them is as none."""
    prompt: Annotated[
        Text | Texts | Tokens | TokenLists | None,
        BeforeValidator(counted_prompt), BeforeValidator(absent), AfterValidator(text_or_fields),
    ] = Field(None, validate_default=True)
    """One text or several, each routed by itself; the prompt of the task that it belongs to is put around it. Or the tokens
    of one prompt or several, which are read as they are."""
    question: Text | None = None
    """Asked of the texts, in place of the task's own."""
    raw: bool = False
    """Read the prompt as it is, without the bank's template. So are tokens, and prompts with ``echo``."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """New tokens at most; default: what the answers of the task need that a text is routed to."""
    best_of: One | None = None
    echo: Boolean | None = None
    """Give the prompt back in front of the answer; with ``logprobs`` also what the model thought of its tokens."""
    logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELY)] | None = None
    """Give the log probability of each token, and so many of the likeliest in its place. The token that ended the answer is
    among them."""
    suffix: Annotated[str, Field(max_length=0)] | None = None
    """Only empty."""


class TextPart(_RequestModel):
    """A part of a message; texts are joined."""

    type: Literal["text"]
    text: Words


class ChatMessage(_RequestModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Words | Annotated[list[TextPart], Field(fail_fast=True)] | None, at_most(MOST_TURNS)] = None
    """Null or left out: no content, which only ``assistant`` may have."""
    name: Ignored | None = None
    """Has no effect."""
    tool_call_id: Ignored | None = None
    """Has no effect."""
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: NoItems | None = None
    """Only empty."""
    annotations: NoItems | None = None
    """Only empty."""
    type: Literal["text", "message"] | None = None
    """Has no effect."""

    @model_validator(mode="after")
    def _check_content(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("missing", "content: found none, expected a text (only assistant may leave it out)")
        return self

    @property
    def text(self) -> str:
        """Its words."""
        parts = self.content or ""
        return parts if isinstance(parts, str) else "".join(part.text for part in parts)


class TextFormat(_RequestModel):
    """The usual form of an answer."""

    type: Literal["text"] = "text"


class ChatRequest(Writing):
    """A conversation to answer. A bank whose tasks were learned in the base model's chat template is asked in it; for
    another the bank's prompt is put around the turns of user and assistant, joined by newlines, and what ``system`` or
    ``developer`` say is the question asked of them."""

    fields: Fields | None = None
    """In place of ``messages``: what the user says, in parts by name, as for completions."""
    messages: Annotated[
        list[ChatMessage],
        Field(fail_fast=True), at_most(MOST_TURNS), BeforeValidator(absent), AfterValidator(text_or_fields),
    ] = Field(default_factory=list, validate_default=True)
    route_by: Literal["turn", "conversation"] | None = None
    """What routes a conversation in turns: the user's last turn (``turn``, the default), or their first one, so
    that it keeps its route."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """As ``max_completion_tokens``."""
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """New tokens at most; default: what the answers of the task need that a text is routed to."""
    logprobs: Boolean | None = None
    """Give the log probability of each token of the answer, the one that ended it among them."""
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELY)] | None = None
    """And so many of the likeliest in its place; above 0 only with ``logprobs``."""
    response_format: TextFormat | None = None
    """Only ``{"type": "text"}``."""
    modalities: Annotated[list[Literal["text"]], Field(max_length=1), at_most(1)] | None = None
    """Only ``["text"]``."""
    audio: None = None
    tools: NoItems | None = None
    """Only empty."""
    tool_choice: Literal["none", "auto"] | None = None
    """Has no effect: there are no tools."""
    parallel_tool_calls: bool | None = None
    """Has no effect: there are no tools."""
    functions: NoItems | None = None
    """Only empty."""
    function_call: Literal["none", "auto"] | None = None
    """Has no effect: there are no functions."""
    store: Off | None = None
    """Only false: nothing is kept."""
    metadata: Annotated[dict[TagName, Ignored], at_most(16)] | None = None
    """Has no effect: nothing is kept. At most 16 entries, as OpenAI takes them."""
    prediction: None = None
    reasoning_effort: Literal["none"] | None = None
    """Has no effect: there is no reasoning."""
    service_tier: Literal["auto", "default"] | None = None
    """Has no effect: there is one."""
    safety_identifier: Ignored | None = None
    """Has no effect."""
    prompt_cache_key: Ignored | None = None
    """Has no effect."""
    prompt_cache_retention: Ignored | None = None
    """Has no effect."""
    verbosity: Literal["medium"] | None = None
    """Has no effect."""
    web_search_options: None = None
    moderation: None = None

    @model_validator(mode="after")
    def _likeliest(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("value_error", "top_logprobs: found a number, expected logprobs: true with it")
        return self


class ClassificationRequest(_RequestModel):
    """Texts to label."""

    model: str | None = None
    """As for completions."""
    fields: Fields | None = None
    """The parts of one text by name, in place of ``input``, as for completions."""
    input: Annotated[
        Text | Texts | None, at_most(MOST_TEXTS), BeforeValidator(absent), AfterValidator(text_or_fields)
    ] = Field(None, validate_default=True)
    """One text or several."""
    labels: Annotated[
        Annotated[list[Text], Field(min_length=1, max_length=MOST_LABELS, fail_fast=True)] | None, at_most(MOST_LABELS)
    ] = None
    """To choose from; default: those of the task that each text is routed to."""
    question: Text | None = None
    """Asked of the texts, in place of the task's own."""
    routing: bool = False
    """Whether each result carries which tasks and adapters it was routed to."""


# ---- responses ------------------------------------------------------------------------------------------------


class RoutingWeights(_ResponseModel):
    """How a text was weighed."""

    task: str | None
    """The strongest task; null where none has any weight."""
    tasks: dict[str, float]
    """Weight of each task's row."""
    adapters: dict[str, float]
    """Weight of the adapter that each task trained, mean over the adapted layers."""
    abstention: float
    """What the tasks lack to 1: the share of the zero adapter."""


class Usage(_ResponseModel):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


Reason = Literal["stop", "length"]


class _AnswerModel(_ResponseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str
    """The version of the bank that answered, the whole of it."""
    usage: Usage | None = None


class CompletionLogprobs(_ResponseModel):
    """What the model thought of the tokens of a text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """Nats; null for the first token of a prompt."""
    top_logprobs: list[dict[str, float] | None]
    """The token itself and the likeliest in its place."""
    text_offset: list[int]
    """Characters in front of each token."""


class CompletionChoice(_ResponseModel):
    """An answer, or in a stream a piece of it."""

    index: int
    text: str
    finish_reason: Reason | None
    logprobs: CompletionLogprobs | None = None
    routing: RoutingWeights | None = None


class Completion(_AnswerModel):
    """Answers to the texts of a request; in a stream a chunk of them."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class ChatTopToken(_ResponseModel):
    """An alternative to a token."""

    token: str
    logprob: float
    bytes: list[int] | None
    """Of its text in UTF-8; null where it is a part of a character."""


class ChatToken(ChatTopToken):
    """A token of the answer."""

    top_logprobs: list[ChatTopToken]


class ChatLogprobs(_ResponseModel):
    """What the model thought of the answer's tokens."""

    content: list[ChatToken]
    refusal: None = None


class AssistantMessage(_ResponseModel):
    """The answer's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(_ResponseModel):
    """The answer."""

    index: int
    message: AssistantMessage
    finish_reason: Reason
    logprobs: ChatLogprobs | None = None
    routing: RoutingWeights | None = None


class ChatCompletion(_AnswerModel):
    """The answer to a conversation."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class Delta(_ResponseModel):
    """What a chunk adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(_ResponseModel):
    """A piece of the answer."""

    index: int
    delta: Delta
    finish_reason: Reason | None = None
    logprobs: ChatLogprobs | None = None
    routing: RoutingWeights | None = None


class ChatChunk(_AnswerModel):
    """One event of a stream."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]


class ClassificationData(_ResponseModel):
    """The label of one text."""

    index: int
    label: str | None
    """Null where there are none to choose from: the router abstained, or chose a task with free-text answers."""
    task: str | None
    """Whose prompt was used, and whose labels unless the request names some; null for a text of no task, and of banks
    without keys where the request names labels and no task."""
    scores: dict[str, float]
    """Share of each label: softmax over what model and keys say of each."""
    foreign: float | None = None
    """How much more the text looks like the background than like the bank's tasks, log odds; left out where the bank has no
    background."""
    routing: RoutingWeights | None = None


class Classifications(_AnswerModel):
    """Labels of the texts of a request."""

    object: Literal["list"] = "list"
    data: list[ClassificationData]


class ModelCard(_ResponseModel):
    """The bank, or one of its tasks."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "amlora-dist"
    version: str
    parent: str | None = None
    """Of a task: the bank."""
    task: str | None = None
    labels: list[str] | None = None
    """Of a task; null where its answers are free text."""


class ModelList(_ResponseModel):
    """The bank and its tasks."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(_ResponseModel):
    """Whether the server can answer, and with what."""

    status: Literal["ok", "stopping", "failed", "engine_away"]
    model: str
    version: str


class ErrorDetail(_ResponseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(_ResponseModel):
    """OpenAI's form of an error."""

    error: ErrorDetail


def sparse(value: Any) -> Any:
    """JSON values without the keys of ours, and ``usage``, where they are null: clients may know no such keys."""
    if isinstance(value, dict):
        return {key: sparse(v) for key, v in value.items() if v is not None or key not in ("usage", "routing", "foreign")}
    return [sparse(item) for item in value] if isinstance(value, list) else value
