"""Rows of conversations: every form that people have, and what is wrong with those that cannot be learned from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from amlora_dist.errors import FaultsError, UserError
from amlora_dist.tasks.conversations import Turn
from amlora_dist.tasks.sources import TaskData, load_task
from amlora_dist.tasks.task import TaskDefaults, TaskSpec, read_mapping

USER, ASSISTANT = {"role": "user", "content": "where?"}, {"role": "assistant", "content": "there"}
TURNS = (Turn("user", "where?"), Turn("assistant", "there"))
SYSTEM = {"role": "system", "content": "Be short."}
FORMS: list[tuple[dict[str, Any], Any, tuple[Turn, ...]]] = [
    ({"messages": [USER, ASSISTANT]}, {"messages": "messages"}, TURNS),
    ({"messages": [{"role": "developer", "content": "Be short."}, USER, ASSISTANT]}, {"messages": "messages"},
     (Turn("system", "Be short."), *TURNS)),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "whe"}, {"type": "text", "text": "re?"}]},
                   {"role": "assistant", "content": [{"type": "text", "text": "there"}]}]},
     {"messages": "messages"}, TURNS),
    ({"prompt": "where?", "completion": "there"}, {"prompt": "prompt", "completion": "completion"}, TURNS),
    ({"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, {"prompt": "prompt", "completion": "completion"},
     (Turn("system", "Be short."), *TURNS)),
    ({"instruction": "where?", "input": "", "output": "there"},
     {"instruction": "instruction", "input": "input", "output": "output"}, TURNS),
    ({"instruction": "Find it.", "input": "a cat", "output": "there"},
     {"instruction": "instruction", "input": "input", "output": "output"},
     (Turn("user", "Find it.\n\na cat"), Turn("assistant", "there"))),
    ({"conversations": [{"from": "human", "value": "where?"}, {"from": "gpt", "value": "there"}]},
     {"conversations": "conversations"}, TURNS),
]  # fmt: skip


def task(folder: Path, columns: Any, form: str = "jsonl", **more: Any) -> TaskSpec:
    mapping = {
        "name": "talk", "version": 1, "kind": "chat", "source": {"kind": "files"}, "columns": columns,
        "splits": {"train": f"train.{form}", "dev": f"dev.{form}", "test": f"test.{form}"},
    } | more  # fmt: skip
    return read_mapping(mapping, origin=folder / "talk.yaml")


def write(folder: Path, rows: list[dict[str, Any]], form: str = "jsonl") -> None:
    """The rows as training split, and others of the same form to test on."""
    for split in ("train", "dev", "test"):
        own = rows
        if split != "train":
            text = json.dumps(rows[0])
            for word in ("where?", "re?", "Find"):
                text = text.replace(word, split)
            own = [json.loads(text)]
        file = folder / f"{split}.{form}"
        if form == "parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(own), file)
        else:
            file.write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")


def loaded(spec: TaskSpec, **defaults: Any) -> TaskData:
    return load_task(spec, defaults=TaskDefaults(**defaults))


@pytest.mark.parametrize("columns", ["named", "auto"])
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize(("row", "named", "turns"), FORMS)
def test_every_form_is_read_named_or_recognised(
    row: dict[str, Any], named: Any, turns: tuple[Turn, ...], form: str, columns: str, tmp_path: Path
) -> None:
    write(tmp_path, [row], form)
    data = loaded(task(tmp_path, named if columns == "named" else "auto", form))
    (made,) = data.rows["train"]
    assert made.turns == turns and made.target == "there" and made.text == turns[-2].text
    assert sorted(data.took.split(", ")) == ([""] if columns == "named" else sorted(named))


@pytest.mark.parametrize("row", [row for row, _, _ in FORMS], ids=[str(n) for n in range(len(FORMS))])
def test_every_form_is_read_from_the_hub(row: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*_: Any, split: str, **__: Any) -> Any:
        text = json.dumps({"id": 7, **row})
        return datasets.Dataset.from_list([json.loads(text.replace("re?", f"re? {split}").replace("Find", split))])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = {"kind": "hub", "repository": "someone/talk", "revision": "abc"}
    data = loaded(task(Path(), "auto", source=source, splits={"train": "train", "dev": "dev", "test": "test"}))
    (made,) = data.rows["train"]
    assert made.target == "there" and "train" in made.text and data.took


def test_what_a_tool_said_is_a_turn_and_the_text_is_the_user_s_last(tmp_path: Path) -> None:
    told = [{"role": "assistant", "content": "One moment."}, {"role": "tool", "content": "aisle 4", "tool_call_id": "1"}]
    write(tmp_path, [{"messages": [USER, *told, ASSISTANT]}])
    (made,) = loaded(task(tmp_path, "auto")).rows["train"]
    assert [turn.role for turn in made.turns] == ["user", "assistant", "tool", "assistant"]
    assert made.text == "where?" and made.turns[2].text == "aisle 4"


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    write(tmp_path, [{"asked": "where?", "said": "there"}])
    assert loaded(task(tmp_path, {"prompt": "asked", "completion": "said"})).rows["train"][0].turns == TURNS
    with pytest.raises(UserError, match=r"no column 'sad'.*did you mean 'said'"):
        loaded(task(tmp_path, {"prompt": "asked", "completion": "sad"}))


def test_auto_says_what_it_found_where_it_cannot_tell(tmp_path: Path) -> None:
    write(tmp_path, [{"asked": "where?", "said": "there"}])
    with pytest.raises(UserError, match="auto: found no form that is known among asked, said, expected one of: mess"):
        loaded(task(tmp_path, "auto"))
    write(tmp_path, [{"messages": [USER, ASSISTANT], "prompt": "where?", "completion": "there"}])
    with pytest.raises(UserError, match=r"found columns of 2 forms \(messages, prompt\)"):
        loaded(task(tmp_path, "auto"))


BAD: list[tuple[Any, str]] = [
    ([USER], "no assistant turn at its end"),
    ([ASSISTANT], "no user turn before its answer"),
    ([USER, {"role": "oracle", "content": "x"}, ASSISTANT], "an unknown role ('oracle') in turn 2 of 'messages'"),
    ([{"role": "user", "content": " \n"}, ASSISTANT], "an empty content in turn 1 of 'messages'"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ASSISTANT],
     "a part of type 'image_url' in turn 1 of 'messages', only text is taken"),
    ([USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}], "tool calls in turn 2 of 'messages'"),
    ("where?", "a value of type str in column 'messages', expected a list of turns"),
    (["where?"], "a value of type str as turn 1 of 'messages'"),
    ([{"role": "user", "content": {"a": 1}}, ASSISTANT], "a dictionary in turn 1 of 'messages'"),
]  # fmt: skip


def test_bad_rows_are_counted_and_named_each_with_its_reason(tmp_path: Path) -> None:
    write(tmp_path, [{"messages": [USER, ASSISTANT]}, *({"messages": bad} for bad, _ in BAD)])
    spec = task(tmp_path, "auto")
    with pytest.raises(FaultsError) as caught:
        loaded(spec)
    message = str(caught.value)
    for place, (_, reason) in enumerate(BAD, start=2):
        assert reason in message and f"row {place}" in message
    data = loaded(spec, on_bad_row="skip")
    assert len(data.rows["train"]) == 1 and len(data.bad) == len(BAD)


def test_two_conversations_that_end_in_the_same_words_are_two(tmp_path: Path) -> None:
    first = [USER, ASSISTANT, {"role": "user", "content": "yes"}, ASSISTANT]
    second = [SYSTEM, *first]
    write(tmp_path, [{"messages": first}, {"messages": second}])
    (tmp_path / "test.jsonl").write_text(json.dumps({"messages": first}) + "\n", encoding="utf-8")
    data = loaded(task(tmp_path, "auto"), on_bad_row="skip")
    assert [row.number for row in data.rows["train"]] == [2], "only the one that the test split has too is left out"


def test_the_classic_format_reads_the_turns_below_each_other(tmp_path: Path) -> None:
    write(tmp_path, [{"messages": [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "and now?"}, ASSISTANT]}])
    (row,) = loaded(task(tmp_path, "auto", prompt={"format": "classic"})).rows["train"]
    assert row.text == "Be short.\nwhere?\nthere\nand now?" and not row.turns


@pytest.mark.parametrize(
    ("columns", "more", "message"),
    [
        ({"messages": "m", "text": "t"}, {}, "one form of rows"),
        ({"prompt": "p"}, {}, "`prompt` and `completion` go together"),
        ({"instruction": "i"}, {}, "`instruction` and `output` go together"),
        ({}, {}, "`text` names the columns"),
        ("auto", {"labels": ["a", "b"]}, "needs `columns.label`"),
        ({"text": "t", "answer": "a"}, {"prompt": {"train_on": "all"}}, "`prompt.train_on` is for rows"),
        ({"text": "t", "answer": "a"}, {"prompt": {"system": "s"}}, "`prompt.system` is for `prompt.format: chat`"),
    ],
)
def test_columns_that_do_not_fit_together_are_refused(
    columns: Any, more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(FaultsError) as caught:
        task(tmp_path, columns, **more)
    assert message in str(caught.value)


def test_a_conversation_has_rouge_l_and_room_for_its_answer(tmp_path: Path) -> None:
    spec = task(tmp_path, "auto")
    assert (spec.metric, spec.max_answer_tokens, spec.open_format) == ("rouge_l", 512, True)
    again = read_mapping(spec.to_mapping(), origin=tmp_path / "talk.yaml")
    assert again.to_mapping() == spec.to_mapping()
