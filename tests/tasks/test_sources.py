"""Rows: from everywhere the same, faults counted and named, samples that depend on content alone."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from amlora_dist.errors import FaultsError, UserError
from amlora_dist.tasks.sources import Row, TaskData, load_task, sample
from amlora_dist.tasks.task import TaskDefaults, TaskSpec, read_mapping

LABELS = [{"value": 0, "text": "World"}, {"value": 1, "text": "Sports"}]
TRAIN = [{"title": f"Title {n}", "body": f" Body of number {n}", "topic": n % 2} for n in range(20)]
DEV = [{"title": f"Held {n}", "body": f"Dev body {n}", "topic": n % 2} for n in range(4)]
TEST = [{"title": f"Test {n}", "body": f"Test body {n}", "topic": n % 2} for n in range(6)]
SPLITS = {"train": TRAIN, "dev": DEV, "test": TEST}


def make_spec(origin: Path, suffix: str = "jsonl", **changes: Any) -> TaskSpec:
    mapping: dict[str, Any] = {
        "name": "news",
        "version": 1,
        "kind": "topic",
        "source": {"kind": "files"},
        "splits": {split: f"{split}.{suffix}" for split in SPLITS},
        "columns": {
            "text": [{"column": "title", "marker": "Title"}, {"column": "body", "marker": "Text"}],
            "label": "topic",
        },
        "labels": LABELS,
    }
    return read_mapping({**mapping, **changes}, origin=origin / "news.yaml")


def write_jsonl(folder: Path, rows: dict[str, list[Any]] = SPLITS) -> None:
    folder.mkdir(exist_ok=True)
    for split, content in rows.items():
        lines = (row if isinstance(row, str) else json.dumps(row) for row in content)
        (folder / f"{split}.jsonl").write_text("".join(line + "\n" for line in lines))


def write_mirror(folder: Path) -> None:
    texts = ["World", "Sports"]
    write_jsonl(
        folder,
        {
            split: [
                {"text": f"Title: {row['title']}\nText: {row['body']}", "label": texts[row["topic"]]} for row in rows
            ]
            for split, rows in SPLITS.items()
        },
    )


def digests(data: TaskData) -> list[str]:
    return [data.digest(split) for split in SPLITS]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The Hub as a recorder of calls that answers with the rows above."""
    import datasets

    calls: list[dict[str, Any]] = []

    def load_dataset(*args: Any, **kwargs: Any) -> datasets.Dataset:
        calls.append({"args": args, **kwargs})
        rows: Any = {"train": TRAIN, "validation": DEV, "test": TEST}[kwargs["split"]]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def hub_spec(**changes: Any) -> TaskSpec:
    source = {"kind": "hub", "repository": "someone/news", "revision": "abc", "config": "all", **changes}
    return make_spec(Path(), source=source, splits={"train": "train", "dev": "validation", "test": "test"})


def test_rows_are_the_same_from_json_csv_parquet_hub_and_mirror(tmp_path: Path, hub: list[Any]) -> None:
    write_jsonl(tmp_path)
    for split, rows in SPLITS.items():
        with (tmp_path / f"{split}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["topic", "body", "title"])
            writer.writeheader()
            writer.writerows(reversed(rows))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{split}.parquet")
    write_mirror(tmp_path / "news")
    loaded = [load_task(make_spec(tmp_path, suffix)) for suffix in ("jsonl", "csv", "parquet")]
    loaded += [load_task(hub_spec()), load_task(hub_spec(), data_dir=tmp_path)]
    assert all(digests(data) == digests(loaded[0]) for data in loaded)
    for data in loaded:
        assert [(row.fields, row.text, row.label, row.target) for row in data.rows["train"]] == [
            (row.fields, row.text, row.label, row.target) for row in loaded[0].rows["train"]
        ]
    assert loaded[0].rows["dev"][0].fields.keys() == {"title", "body"}


def test_hub_set_is_asked_for_pinned_and_without_its_code(hub: list[Any]) -> None:
    load_task(hub_spec())
    assert [call["args"] for call in hub] == [("someone/news", "all")] * 3
    assert {call["revision"] for call in hub} == {"abc"}
    assert all("trust_remote_code" not in call for call in hub)


def test_hub_that_cannot_be_reached_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        UserError, match=r"someone/news@abc \(all\), split 'train' cannot be loaded: no route.*data_dir"
    ):
        load_task(hub_spec())


def test_hub_schema_that_changed_names_the_column(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_list([{"titel": "x", "body": "y", "topic": 0}])
    )
    with pytest.raises(UserError, match=r"no column 'title' \(did you mean 'titel'\?\), it has titel, body, topic"):
        load_task(hub_spec())


def test_field_markers_are_stripped_or_kept_and_neutral_ones_stay(tmp_path: Path) -> None:
    write_jsonl(tmp_path)
    write_mirror(tmp_path / "news")
    for data_dir, spec in ((None, make_spec(tmp_path)), (tmp_path, hub_spec())):
        stripped = load_task(spec, data_dir=data_dir).rows["dev"]
        kept = load_task(spec, defaults=TaskDefaults(field_markers="keep"), data_dir=data_dir).rows["dev"]
        assert {row.text for row in stripped} >= {"Held 0\nDev body 0"}
        assert {row.text for row in kept} >= {"Title: Held 0\nText: Dev body 0"}
    columns = {"text": [{"column": "title", "marker": "sentence 1", "neutral": True}, "body"], "label": "topic"}
    pairs = load_task(make_spec(tmp_path, columns=columns)).rows["dev"]
    assert {row.text for row in pairs} >= {"sentence 1: Held 0\nDev body 0"}


def test_mirror_text_without_markers_stays_whole(tmp_path: Path) -> None:
    write_mirror(tmp_path / "news")
    rows = [{"text": f"no title here {n}\nTitle: in the middle", "label": "World"} for n in range(2)]
    write_jsonl(tmp_path / "news", {"test": rows})
    row = load_task(hub_spec(), data_dir=tmp_path).rows["test"][0]
    assert row.text.startswith("no title here") and row.text.endswith("Title: in the middle")


def test_jinja_value_joins_columns_and_takes_null_for_nothing(tmp_path: Path) -> None:
    rows = {split: [{**row, "title": None} for row in rows] for split, rows in SPLITS.items()}
    write_jsonl(tmp_path, rows)
    columns = {"text": {"value": "{{ title }}{{ body }}!", "marker": "Question"}, "label": "topic"}
    assert load_task(make_spec(tmp_path, columns=columns)).rows["dev"][0].text.startswith("Dev body")


def test_each_kind_of_bad_row_is_named_in_its_own_words_under_its_own_split(tmp_path: Path) -> None:
    bad = [
        {"title": "a", "body": "b"},
        {"title": "a", "body": "b", "topic": "Sprots"},
        {"title": " ", "body": None, "topic": 0},
        TEST[0],
        {"title": "c", "body": "d", "topic": ""},
    ]
    write_jsonl(tmp_path, {**SPLITS, "train": [*bad, *TRAIN], "dev": [TEST[1], *DEV]})
    spec = make_spec(tmp_path)
    with pytest.raises(FaultsError) as caught:
        load_task(spec)
    message = str(caught.value)
    train = f"train ({tmp_path / 'train.jsonl'})"
    assert f"{train}, rows 1, 5: found no label, expected a label in column 'topic'" in message
    assert f"{train}, row 2: found an unknown label ('Sprots'), expected one of 0, 1" in message
    assert f"{train}, row 3: found an empty text, expected a text in the columns of `columns.text`" in message
    assert f"{train}, row 4" not in message, "one of 21 is left out and counted"
    shared = "row 1: found a text that is also in test (1 of the 5 rows of dev, 20%), expected at most 10%"
    assert f"dev ({tmp_path / 'dev.jsonl'}), {shared}" in message
    assert "on_bad_row: skip" in message and "4 faults" in message
    assert message.index(f"{train}, row 3") < message.index("dev (")
    data = load_task(spec, defaults=TaskDefaults(on_bad_row="skip"))
    assert Counter(row.split for row in data.bad) == {"train": 5, "dev": 1}
    assert {(row.number, row.reason) for row in data.bad if row.split == "train"} >= {(1, "no label")}
    assert (len(data.rows["train"]), len(data.rows["dev"]), len(data.rows["test"])) == (20, 4, 6)


def test_texts_of_two_splits_are_left_out_and_counted_unless_they_are_many(tmp_path: Path) -> None:
    write_jsonl(tmp_path)
    clean = load_task(make_spec(tmp_path))
    assert clean.remarks == ""
    write_jsonl(tmp_path, {"train": [*TRAIN, TEST[0], DEV[0]]})
    data = load_task(make_spec(tmp_path))
    assert digests(data) == digests(clean)
    left = "1 of train (a text that is also in test), 1 of train (a text that is also in dev)"
    assert data.remarks == f"task 'news': left out 2 rows: {left}"
    write_jsonl(tmp_path, {"train": [*TRAIN, *TEST[:3]]})
    with pytest.raises(FaultsError, match=r"3 of the 23 rows of train, 13%\), expected at most 10%"):
        load_task(make_spec(tmp_path))


def test_dev_data_that_are_the_test_data_are_reported(tmp_path: Path) -> None:
    write_jsonl(tmp_path, {**SPLITS, "dev": TEST})
    with pytest.raises(FaultsError, match=r"all 6 rows of dev do, it is the same data.*leave `splits.dev` out"):
        load_task(make_spec(tmp_path))


def words_spec(folder: Path, labels: Any) -> TaskSpec:
    columns = {"text": "text", "label": "label"}
    return make_spec(folder, columns=columns, **({} if labels is None else {"labels": labels}))


def test_labels_auto_are_those_of_the_training_rows_as_if_they_were_written_out(tmp_path: Path) -> None:
    names = {"train": ["card_arrival", "top_up  failed", "age limit"], "dev": ["age limit"], "test": ["card_arrival"]}
    rows = {split: [{"text": f"{split} {n}", "label": own[n % len(own)]} for n in range(6)] for split, own in names.items()}
    write_jsonl(tmp_path, rows)
    written = [
        {"value": "age limit", "text": "age limit"}, {"value": "card_arrival", "text": "card arrival"},
        {"value": "top_up  failed", "text": "top up failed"},
    ]  # fmt: skip
    auto, listed = load_task(words_spec(tmp_path, "auto")), load_task(words_spec(tmp_path, written))
    assert auto.spec.to_mapping() == listed.spec.to_mapping()
    assert digests(auto) == digests(listed)
    assert auto.spec.label_texts == ["age limit", "card arrival", "top up failed"]
    alone = load_task(words_spec(tmp_path, "auto"), splits=("test",))
    assert alone.spec.labels == listed.spec.labels, "labels are the training rows', whichever split is asked for"
    write_jsonl(tmp_path, {**rows, "test": [{"text": "new", "label": "unheard_of"}]})
    with pytest.raises(FaultsError, match=r"row 1: found an unknown label \('unheard_of'\), expected one of age limit"):
        load_task(words_spec(tmp_path, "auto"))


def test_labels_auto_of_one_label_or_of_free_text_are_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path, {split: [{"text": f"{split} {n}", "label": "same"} for n in range(3)] for split in SPLITS})
    with pytest.raises(UserError, match=r"task 'news': labels: auto: found only 'same'.*at least two labels"):
        load_task(words_spec(tmp_path, "auto"))
    write_jsonl(tmp_path, {split: [{"text": f"{split} {n}", "label": f"l {n}"} for n in range(30)] for split in SPLITS})
    with pytest.raises(UserError, match=r"found 30 different labels in 30 training rows.*`columns\.answer`"):
        load_task(words_spec(tmp_path, "auto"))
    with pytest.raises(FaultsError, match="labels: found 'auot', expected a list, or auto"):
        words_spec(tmp_path, "auot")


def test_labels_auto_of_a_mirror_are_its_verbalisers(tmp_path: Path) -> None:
    write_mirror(tmp_path / "news")
    mapping = hub_spec().to_mapping() | {"labels": "auto"}
    data = load_task(read_mapping(mapping, origin=tmp_path / "news.yaml"), data_dir=tmp_path)
    assert data.spec.label_texts == ["Sports", "World"]


def test_rows_may_be_an_array_or_below_keys_of_one_object(tmp_path: Path) -> None:
    write_jsonl(tmp_path)
    lines = digests(load_task(make_spec(tmp_path)))
    for split, rows in SPLITS.items():
        (tmp_path / f"{split}.json").write_text(json.dumps(rows, indent=1))
    assert digests(load_task(make_spec(tmp_path, "json"))) == lines
    for split, rows in SPLITS.items():
        (tmp_path / f"{split}.json").write_text(json.dumps({"version": 1, "data": {"items": rows}}, indent=1))
    with pytest.raises(UserError, match=r"train\.json: found one JSON object with a list of rows.*records: data\.items"):
        load_task(make_spec(tmp_path, "json"))
    source = {"kind": "files", "records": "data.items"}
    assert digests(load_task(make_spec(tmp_path, "json", source=source))) == lines
    for records, message in (("data.rows", "no key 'rows' on the way 'data.rows', there is items"),
                             ("version", "found int at 'version'")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            load_task(make_spec(tmp_path, "json", source=source | {"records": records}))
    with pytest.raises(FaultsError, match="`records` is for"):
        make_spec(tmp_path, "csv", source=source | {"format": "csv"})


def test_many_bad_rows_are_counted_not_all_listed(tmp_path: Path) -> None:
    write_jsonl(tmp_path, {**SPLITS, "train": [{"title": f"t{n}", "body": "b"} for n in range(100)] + TRAIN})
    with pytest.raises(FaultsError, match=r"rows 1, 2, 3, .* 12 and 88 more: found no label"):
        load_task(make_spec(tmp_path))


def test_skipped_bad_rows_leave_the_digest_of_a_clean_file(tmp_path: Path) -> None:
    write_jsonl(tmp_path)
    clean = load_task(make_spec(tmp_path)).digest("train")
    write_jsonl(tmp_path, {"train": [{"title": "x", "body": "y"}, *reversed(TRAIN)]})
    assert load_task(make_spec(tmp_path), defaults=TaskDefaults(on_bad_row="skip")).digest("train") == clean


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"train\.jsonl, line 2: found '\{not json', expected one JSON object"),
        ('["a"]', r"train\.jsonl, line 2: found list, expected one JSON object"),
    ],
)
def test_line_that_is_not_json_is_named(tmp_path: Path, line: str, message: str) -> None:
    write_jsonl(tmp_path, {**SPLITS, "train": [TRAIN[0], line, *TRAIN[1:]]})
    with pytest.raises(UserError, match=message):
        load_task(make_spec(tmp_path))


def test_files_that_are_missing_empty_or_of_another_kind_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"file .*train\.jsonl does not exist"):
        load_task(make_spec(tmp_path))
    write_jsonl(tmp_path, {**SPLITS, "train": []})
    with pytest.raises(UserError, match=r"train\.jsonl: found no rows, expected those of task 'news'"):
        load_task(make_spec(tmp_path))
    write_jsonl(tmp_path)
    (tmp_path / "train.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match=r"train\.jsonl: not UTF-8"):
        load_task(make_spec(tmp_path))
    splits = {"train": "*.txt", "test": "test.jsonl"}
    with pytest.raises(UserError, match=r"no file matches .*\*\.txt"):
        load_task(make_spec(tmp_path, splits=splits))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"unknown suffix '\.txt'.*source\.format"):
        load_task(make_spec(tmp_path, splits=splits))
    (tmp_path / "train.parquet").write_text("PAR?")
    with pytest.raises(UserError, match=r"train\.parquet: found 4 bytes, expected Parquet"):
        load_task(make_spec(tmp_path, splits={"train": "train.parquet", "test": "test.jsonl"}))


def test_missing_column_names_what_is_there(tmp_path: Path) -> None:
    write_jsonl(tmp_path, {split: [{**row, "lable": 1} for row in rows] for split, rows in SPLITS.items()})
    columns = {"text": "body", "label": "label"}
    with pytest.raises(UserError, match=r"no column 'label' \(did you mean 'lable'\?\)"):
        load_task(make_spec(tmp_path, columns=columns))


def test_csv_row_with_a_wrong_number_of_cells_is_a_bad_row(tmp_path: Path) -> None:
    write_jsonl(tmp_path)
    (tmp_path / "train.csv").write_text("title,body,topic\na,b,0\nc,d\ne,f,1,9\ng,h,1\n")
    spec = make_spec(tmp_path, splits={"train": "train.csv", "dev": "dev.jsonl", "test": "test.jsonl"})
    with pytest.raises(FaultsError, match=r"rows 2, 3: found a wrong number of cells"):
        load_task(spec)


def test_split_without_usable_rows_is_an_error(tmp_path: Path) -> None:
    write_jsonl(tmp_path, {**SPLITS, "dev": [{"title": "a", "body": "b", "topic": None}]})
    with pytest.raises(UserError, match="split 'dev' has no usable row"):
        load_task(make_spec(tmp_path), defaults=TaskDefaults(on_bad_row="skip"))


def test_globs_read_all_files_and_name_the_one_at_fault(tmp_path: Path) -> None:
    write_jsonl(tmp_path, {"part1": TRAIN[:10], "part2": [*TRAIN[10:], {"title": "a", "body": "b"}], "test": TEST})
    spec = make_spec(tmp_path, splits={"train": "part*.jsonl", "test": "test.jsonl"})
    with pytest.raises(FaultsError, match=r"train \(.*part2\.jsonl\), row 11: found no label"):
        load_task(spec)
    data = load_task(spec, defaults=TaskDefaults(on_bad_row="skip"))
    assert len(data.rows["train"]) + len(data.rows["dev"]) == 20


def test_dev_is_held_out_of_train_the_same_for_every_seed_and_order(tmp_path: Path) -> None:
    write_jsonl(tmp_path, {"train": [*TRAIN, TRAIN[0]], "test": TEST})
    splits = {"train": "train.jsonl", "test": "test.jsonl", "dev_rows": 4}
    first = load_task(make_spec(tmp_path, splits=splits), seed=1)
    write_jsonl(tmp_path, {"train": [TRAIN[0], *reversed(TRAIN)]})
    second = load_task(make_spec(tmp_path, splits=splits), seed=2)
    assert digests(first) == digests(second)
    assert Counter(row.target for row in first.rows["dev"]) == {"World": 2, "Sports": 2}
    assert not {row.text for row in first.rows["dev"]} & {row.text for row in first.rows["train"]}
    assert first.bad == []


def row(number: int, label: str) -> Row:
    return Row(number, {}, f"text {number}", label, label)


def test_sample_is_balanced_nested_and_independent_of_order() -> None:
    rows = [row(n, "a") for n in range(50)] + [row(n, "b") for n in range(50, 60)] + [row(60, "c")]
    chosen = sample(rows, 9, seed=3)
    assert Counter(one.label for one in chosen) == {"a": 4, "b": 4, "c": 1}
    assert sample(rows[::-1], 9, seed=3) == chosen
    assert {one.number for one in sample(rows, 5, seed=3)} < {one.number for one in chosen}
    assert sample(rows, 9, seed=4) != chosen
    assert len(sample(rows, 61, seed=3)) == len(sample(rows, None, seed=3)) == 61


def test_limits_mean_at_most_and_the_task_may_pin_its_seed(tmp_path: Path) -> None:
    write_jsonl(tmp_path)
    spec = make_spec(tmp_path)
    limits = TaskDefaults(max_train=6, max_test=1000)
    data = load_task(spec, defaults=limits, seed=0)
    assert Counter(row.target for row in data.rows["train"]) == {"World": 3, "Sports": 3}
    assert len(data.rows["test"]) == 6
    assert load_task(spec, defaults=limits, seed=1).digest("train") != data.digest("train")
    pinned = make_spec(tmp_path, seed=0)
    assert load_task(pinned, defaults=limits, seed=1).digest("train") == data.digest("train")


def test_max_read_takes_rows_from_the_whole_of_a_sorted_file(tmp_path: Path) -> None:
    ordered = sorted(TRAIN, key=lambda row: int(row["topic"]))  # type: ignore[call-overload]
    write_jsonl(tmp_path, {**SPLITS, "train": ordered})
    data = load_task(make_spec(tmp_path, source={"kind": "files", "max_read": 10}))
    assert Counter(row.target for row in data.rows["train"]) == {"World": 5, "Sports": 5}


def test_free_text_answers_are_taken_as_they_are(tmp_path: Path) -> None:
    rows = {split: [{"q": f"{split} {n}", "a": f" answer {n} "} for n in range(5)] for split in SPLITS}
    write_jsonl(tmp_path, rows)
    mapping = make_spec(tmp_path).to_mapping() | {"columns": {"text": "q", "answer": "a"}}
    del mapping["labels"], mapping["metric"]
    data = load_task(read_mapping(mapping, origin=tmp_path / "x.yaml"), defaults=TaskDefaults(max_train=3))
    assert len(data.rows["train"]) == 3
    assert data.rows["train"][0].target.startswith("answer") and data.rows["train"][0].label is None


def test_free_text_may_have_several_right_answers(tmp_path: Path) -> None:
    rows = {split: [{"q": f"{split} {n}", "a": ["one", " two ", "", "one"]} for n in range(5)] for split in SPLITS}
    write_jsonl(tmp_path, rows)
    mapping = make_spec(tmp_path).to_mapping() | {"columns": {"text": "q", "answer": "a"}}
    del mapping["labels"], mapping["metric"]
    spec = read_mapping(mapping, origin=tmp_path / "x.yaml")
    several = load_task(spec)
    assert {(row.target, row.references) for row in several.rows["test"]} == {("one", ("two",))}
    write_jsonl(tmp_path, {split: [{**row, "a": "one"} for row in own] for split, own in rows.items()})
    assert load_task(spec).digest("test") != several.digest("test")
    write_jsonl(tmp_path, {**rows, "train": [{"q": "x", "a": []}, {"q": "y", "a": [["z"]]}]})
    with pytest.raises(FaultsError, match=r"row 1: found no answer, expected an answer in column 'a'") as caught:
        load_task(spec)
    assert "row 2: found a list in column 'a', expected a text" in str(caught.value)


def test_only_the_splits_asked_for_are_returned(tmp_path: Path) -> None:
    write_jsonl(tmp_path)
    assert list(load_task(make_spec(tmp_path), splits=("test",)).rows) == ["test"]


def test_several_values_of_one_label_text_have_one_canonical_value(tmp_path: Path) -> None:
    labels = [{"value": v, "text": t} for v, t in ((0, "bad"), (1, "bad"), (2, "good"))]
    rows = {split: [{"t": f"{split} {n}", "l": n} for n in range(3)] for split in SPLITS}
    write_jsonl(tmp_path, rows)
    data = load_task(make_spec(tmp_path, columns={"text": "t", "label": "l"}, labels=labels))
    assert sorted((row.label, row.target) for row in data.rows["train"]) == [("0", "bad"), ("0", "bad"), ("2", "good")]
