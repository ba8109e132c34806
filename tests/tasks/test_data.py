from __future__ import annotations

import json
import re
from collections import Counter

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from pydantic import ValidationError

from helpers.data import ROWS, write_rows
from redpeft.errors import UserError
from redpeft.storage import is_local
from redpeft.tasks import data as data_module
from redpeft.tasks.base import TASKS, DataConfig
from redpeft.tasks.columns import ROW, where
from redpeft.tasks.data import guess_task, read_data, read_evaluation, read_splits


@pytest.fixture
def mixed(tmp_path):
    """Chats, prompts with responses and texts, in files."""
    chats = [
        {"conversations": [{"from": "human", "value": f"Hi {i}"}, {"from": "gpt", "value": "Yo"}]} for i in range(40)
    ]
    asked = [{"q": f"Say {i}", "a": str(i), "system": "Count."} for i in range(200)]
    return [
        {"path": write_rows(tmp_path / "chats.jsonl", chats), "weight": 1},
        {"path": write_rows(tmp_path / "asked.csv", asked), "prompt": "q", "response": "a", "weight": 3},
        {"path": write_rows(tmp_path / "texts.jsonl", [{"text": "Once"}] * 9)},
    ]


def test_data_sets_of_any_form_are_mixed_by_weight(mixed, caplog):
    caplog.set_level("INFO")
    chats, asked, _ = mixed
    data = DataConfig(mix=[chats, asked])
    assert guess_task(data) == "instruction"
    task, splits = read_data("instruction", data, seed=3)
    assert task.columns == {"messages": "messages", "tools": "tools"}
    rows = Counter(row.partition(" of ")[2] for row in splits["train"][ROW])
    assert len(set(splits["train"][ROW])) == len(splits["train"])
    ends = {chats["path"]: 36, asked["path"]: 180}  # the rest validates
    assert any(rows[path] == most for path, most in ends.items())
    assert 1.5 < rows[asked["path"]] / rows[chats["path"]] < 6
    assert (
        f"data.mix: {rows.total()} training rows: {rows[chats['path']]} of 36 rows of {chats['path']}, " in caplog.text
    )
    assert Counter(row.partition(" of ")[2] for row in splits["validation"][ROW]) == {
        chats["path"]: 4,
        asked["path"]: 20,
    }
    assert not set(splits["validation"][ROW]) & set(splits["train"][ROW])
    first = next(row for row in splits["train"] if row[ROW].endswith("csv"))
    number = int(first[ROW].partition(" ")[0]) - 1
    assert [(turn["role"], turn["content"]) for turn in json.loads(first["messages"])] == [
        ("system", "Count."), ("user", f"Say {number}"), ("assistant", str(number)),
    ]  # fmt: skip
    again = read_data("instruction", data, seed=3)[1]["train"]
    assert again[ROW] == splits["train"][ROW] != read_data("instruction", data, seed=4)[1]["train"][ROW]
    few = read_data("instruction", data.model_copy(update={"max_train_rows": 8, "max_eval_rows": 4}))[1]
    assert {name: len(split) for name, split in few.items()} == {"train": 8, "validation": 4}


def test_preferences_of_any_form_are_mixed(tmp_path, caplog):
    caplog.set_level("INFO")
    asked, better, worse = ([{"role": role, "content": text}] for role, text in
                            (("user", "Hi"), ("assistant", "Hello!"), ("assistant", "No.")))  # fmt: skip
    forms = [
        {"prompt": "Hi", "chosen": "Hello!", "rejected": "No."},
        {"prompt": asked, "chosen": better, "rejected": worse},
        {"chosen": asked + better, "rejected": asked + worse},
    ]
    paths = [write_rows(tmp_path / f"{at}.jsonl", [form] * 8) for at, form in enumerate(forms)]
    task, splits = read_data("preference", DataConfig(mix=[*paths, paths[0]]))
    assert task.columns == {name: name for name in ("prompt", "chosen", "rejected", "tools")}
    assert [task._pairs(row, with_labels=True) for row in splits["train"]] == [
        [(asked, better, None), (asked, worse, None)]
    ] * len(splits["train"])
    assert f" of 14 rows of {paths[0]}, " in caplog.text  # of both parts
    rated = write_rows(tmp_path / "rated.jsonl", [{"prompt": "Hi", "completion": "Yo", "label": "yes"}] * 8)
    with pytest.raises(UserError, match="another prompt, response, tools, label: they cannot be mixed"):
        read_data("preference", DataConfig(mix=[paths[0], rated]), loss="kto")
    labels = read_data("preference", DataConfig(mix=[rated]), loss="kto")[1]["train"]["label"]
    assert labels == [True] * len(labels)


def test_labels_of_mixed_data_are_those_of_all(tmp_path):
    one = write_rows(
        tmp_path / "one.csv", [{"review": "good film", "stars": "5"}, {"review": "bad film", "stars": "1"}] * 9
    )
    two = write_rows(tmp_path / "two.csv", [{"text": "a film", "label": "3"}, {"text": "the film", "label": "5"}] * 9)
    data = DataConfig(mix=[{"path": one, "label": "stars"}, {"path": two}])
    task, _ = read_data("classification", data, problem_type="single_label_classification")
    assert (task.columns, task.label_names) == ({"text": "text", "label": "label"}, ["1", "3", "5"])


def test_groups_of_mixed_data_stay_together(tmp_path):
    """One data set is a table with numbers, the other has texts; both have a customer 3, who is not the same."""
    one = [{"prompt": f"Say {i}", "response": str(i), "customer": i // 10} for i in range(60)]
    two = [
        {"messages": [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "Yo"}]}
        | {"customer": None if i > 50 else str(i // 10)}
        for i in range(60)
    ]
    mix = [{"path": write_rows(tmp_path / "one.csv", one)}, {"path": write_rows(tmp_path / "two.jsonl", two)}]
    data = DataConfig(mix=mix, group="customer", validation_fraction=0.2)
    for seed in range(4):
        task, splits = read_data("instruction", data, seed=seed)
        assert task.columns == {"messages": "messages", "tools": "tools"}
        train, validation = ({key for key in splits[name]["group"] if key} for name in ("train", "validation"))
        assert train
        assert validation
        assert not train & validation
        counts = Counter(splits["validation"]["group"])
        assert all(count == 10 for key, count in counts.items() if key and key != f"5 of {mix[1]['path']}")
    rows, groups = splits["train"][ROW], splits["train"]["group"]
    assert all(row.endswith(key.partition(" of ")[2]) for row, key in zip(rows, groups, strict=True) if key)
    few = read_data("instruction", data.model_copy(update={"max_eval_rows": 10}))[1]["validation"]
    assert len({key for key in few["group"] if key}) <= 1
    with pytest.raises(UserError, match=r"one.csv has no column 'client'; its columns are prompt, response, customer"):
        read_data("instruction", data.model_copy(update={"group": "client"}))


def test_mixes_that_cannot_be(mixed, tmp_path):
    chats, asked, texts = mixed
    wrong = write_rows(tmp_path / "wrong.jsonl", [{"messages": [{"role": "bot", "content": "Hi"}]}])
    for mix, message in [
        ([chats, texts], "data.mix: one data set has messages, tools and another text: they cannot be mixed"),
        (
            [asked, {"path": wrong}],
            "wrong.jsonl, row 1: a message has the role 'bot'; roles are system, user, assistant",
        ),
        ([chats, {"path": asked["path"]}], "cannot tell which column of asked.csv is the prompt"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            read_data("instruction", DataConfig(mix=mix))
    for fields, message in [
        ({"mix": [{**chats, "pathh": "x"}]}, "data set 1 of `mix` has an unknown field 'pathh'"),
        ({"mix": [chats, {**asked, "weight": 0}]}, "data set 2 of `mix` has the weight 0: give a number above 0"),
        (
            {"mix": [chats, {**asked, "weight": True}]},
            "data set 2 of `mix` has the weight True: give a number above 0",
        ),
        ({"mix": [chats, {"weight": 2}]}, "data set 2 of `mix`: no data: give `path`, `train` or `mix`"),
        ({"mix": [{**chats, "header": "last"}]}, "data set 1 of `mix`.header: Input should be 'first' or 'none'"),
        ({"mix": [chats], "path": "x"}, "with `mix`, each data set of it has its own `path`"),
    ]:
        with pytest.raises(ValidationError, match=re.escape(message)):
            DataConfig(**fields)


def test_the_task_of_data_is_guessed_and_said(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    chats = write_rows(tmp_path / "chats.jsonl", [{"messages": [{"role": "user", "content": "Hi"}]}])
    assert guess_task(DataConfig(path=chats)) == guess_task(DataConfig(path=chats)) == "instruction"
    said = "chats.jsonl has the column messages: the task is instruction; task=... overrides this"
    assert caplog.messages == [said]  # once
    assert guess_task(DataConfig(path=chats, label="messages")) == "classification"
    assert guess_task(DataConfig(path=str(tmp_path / "none.csv"))) == "classification"
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    if "preference" in TASKS:
        assert guess_task(DataConfig(path=pairs)) == "preference"
        assert guess_task(DataConfig(path=pairs, chat_template="plain")) == "preference"
    table = write_rows(tmp_path / "chats.csv", [{"messages": '[{"role": "user", "content": "Hi"}]'}])
    assert guess_task(DataConfig(path=table)) == "instruction"
    caplog.clear()
    texts = write_rows(tmp_path / "texts.csv", [{"a": "Hi"}])
    assert guess_task(DataConfig(path=texts)) == "classification"
    assert caplog.messages == [
        "texts.csv has the columns a: the task is taken to be classification; task=... overrides this"
    ]
    for named in ({"text": "a"}, {"system": "a"}):
        assert guess_task(DataConfig(path=texts, **named)) == "instruction"
    monkeypatch.setattr("redpeft.tasks.data.TASKS", ["classification"])
    with pytest.raises(UserError) as caught:
        guess_task(DataConfig(path=write_rows(tmp_path / "more.jsonl", [{"chosen": "b", "rejected": "c"}])))
    assert str(caught.value) == (
        "more.jsonl has the columns chosen, rejected, for the task preference, which this version does not have; name "
        "another task and its columns to use them otherwise"
    )


def test_folder_with_splits_under_their_usual_names(tmp_path, caplog):
    caplog.set_level("INFO")
    write_rows(tmp_path / "Train.csv", ROWS)
    write_rows(tmp_path / "dev.jsonl", ROWS[:4])
    write_rows(tmp_path / "test.tsv", ROWS[:2])
    (tmp_path / "README.md").write_text("notes")
    splits = read_splits(DataConfig(path=str(tmp_path)))
    assert {name: len(split) for name, split in splits.items()} == {"train": 20, "validation": 4, "test": 2}
    assert where(splits["validation"], 2) == "dev.jsonl, row 3"
    assert caplog.messages == []
    write_rows(tmp_path / "train_prefs.csv", ROWS)
    assert len(read_splits(DataConfig(path=str(tmp_path)))["train"]) == 20
    assert caplog.messages == [f"{tmp_path}: not read: train_prefs"]
    (tmp_path / "Train.csv").rename(tmp_path / "train_gen.csv")
    assert len(read_splits(DataConfig(path=str(tmp_path)))["train"]) == 20
    assert caplog.messages[1:] == [f"{tmp_path}: not read: train_gen"]


def test_files_that_are_named_go_before_the_folder(tmp_path):
    for name in ("train", "validation", "other"):
        write_rows(tmp_path / f"{name}.csv", ROWS[: len(name)])
    splits = read_splits(
        DataConfig(path=str(tmp_path), validation=str(tmp_path / "train.csv"), test=str(tmp_path / "other.csv"))
    )
    assert {name: len(split) for name, split in splits.items()} == {"train": 5, "validation": 5, "test": 5}
    assert splits["validation"].info.description == "train.csv"


def test_folder_errors(tmp_path):
    config = DataConfig(path=str(tmp_path))
    write_rows(tmp_path / "rows.csv", ROWS)
    with pytest.raises(UserError, match=r"holds no train, validation or test file .* it holds rows.csv"):
        read_splits(config)
    write_rows(tmp_path / "test.csv", ROWS)
    with pytest.raises(UserError, match="has no training split; it has test"):
        read_splits(config)
    write_rows(tmp_path / "test.jsonl", ROWS)
    with pytest.raises(UserError, match=r"holds both test.csv and test.jsonl: remove one"):
        read_splits(config)


def write_parts(folder, name, rows, parts):
    """Parquet files as the Hub names them, with its labels by number."""
    features = Features(text=Value("string"), label=ClassLabel(names=["bad", "good"]))
    dataset = Dataset.from_list(rows, features=features)
    for index in range(parts):
        part = dataset.shard(parts, index, contiguous=True)
        part.to_parquet(folder / f"{name}-{index:05d}-of-{parts:05d}.parquet")


@pytest.mark.parametrize("inside", [".", "data"])
def test_a_snapshot_of_the_hub_with_files_in_parts(tmp_path, inside):
    (tmp_path / inside).mkdir(exist_ok=True)
    (tmp_path / "README.md").write_text("notes")
    rows = [{"text": f"row {i}", "label": "good" if i % 3 else "bad"} for i in range(10)]
    write_parts(tmp_path / inside, "train", rows, 3)
    write_parts(tmp_path / inside, "validation", rows[:4], 1)
    splits = read_splits(DataConfig(path=str(tmp_path)))
    train = splits["train"]
    assert train["text"] == [row["text"] for row in rows]
    assert train.features["label"].int2str(train["label"]) == [row["label"] for row in rows]
    assert train[ROW] == list(range(1, 11))
    assert where(train, 7) == "train (3 parts), row 8"
    assert where(splits["validation"], 1) == "validation-00000-of-00001.parquet, row 2"


def test_parts_that_are_not_whole_or_do_not_agree(tmp_path):
    config = DataConfig(path=str(tmp_path))
    rows = [{"text": "a", "label": "good"}, {"text": "b", "label": "bad"}] * 3
    write_parts(tmp_path, "train", rows, 3)
    middle = tmp_path / "train-00001-of-00003.parquet"
    middle.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"holds 2 of 3 parts of one file, such as train-00000-of-00003.parquet$"):
        read_splits(config)
    (tmp_path / "elsewhere").rename(middle)
    write_rows(tmp_path / "train.csv", ROWS)
    with pytest.raises(UserError, match=r"holds both train-00000-of-00003.parquet and .*: remove one$"):
        read_splits(config)
    (tmp_path / "train.csv").unlink()
    Dataset.from_dict({"text": [1.5], "label": [[1]]}).to_parquet(middle)
    with pytest.raises(UserError, match=r"the parts of train-00000-of-00003.parquet do not agree: ") as caught:
        read_splits(config)
    assert "\n" not in str(caught.value)


def test_csv_in_parts_and_a_configuration_within_a_folder(tmp_path):
    (tmp_path / "en").mkdir()
    write_rows(tmp_path / "en" / "train-00000-of-00002.csv", ROWS[:5])
    write_rows(tmp_path / "en" / "train-00001-of-00002.csv", ROWS[5:])
    write_rows(tmp_path / "en" / "dev.csv", ROWS[:2])
    splits = read_splits(DataConfig(path=str(tmp_path), config_name="en"))
    assert {name: len(split) for name, split in splits.items()} == {"train": 20, "validation": 2}
    with pytest.raises(UserError, match=r"no such file or folder: .*/fr$"):
        read_splits(DataConfig(path=str(tmp_path), config_name="fr"))


@pytest.mark.parametrize("name", ["none.csv", "./none", "data/none.csv", "a/b/c", "/none", "~/none"])
def test_no_such_file_or_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^no such file or folder: {name}$"):
        read_splits(DataConfig(path=name))


def test_a_missing_file_in_a_folder_that_exists_is_no_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_local("owner/rows")
    (tmp_path / "owner").mkdir()
    assert is_local("owner/rows")


def test_hub_splits_and_errors(monkeypatch):
    rows = Dataset.from_dict({"sentence": ["a", "b"] * 4, "label": [0, 1] * 4})
    unlabelled = Dataset.from_dict({"sentence": ["a"], "label": [-1]}).cast_column(
        "label", ClassLabel(names=["n", "p"])
    )
    found = DatasetDict(train=rows, validation_matched=rows.select(range(4)), test=unlabelled)
    asked = []
    monkeypatch.setattr(data_module, "load_dataset", lambda *names: asked.append(names) or found)
    splits = read_splits(DataConfig(path="owner/rows", config_name="mnli"))
    assert asked == [("owner/rows", "mnli")]
    assert {name: len(split) for name, split in splits.items()} == {"train": 8, "validation": 4}  # test has no labels
    assert where(splits["train"], 6) == "owner/rows (train), row 7"
    assert len(read_evaluation("owner/rows")) == 4

    monkeypatch.setattr(data_module, "load_dataset", lambda *_: DatasetDict(test=unlabelled))
    with pytest.raises(UserError, match="owner/rows has no train, validation or test split with labels"):
        read_evaluation("owner/rows")

    def offline(*names):
        raise ConnectionError("Couldn't reach the Hub\nlong story")

    monkeypatch.setattr(data_module, "load_dataset", offline)
    with pytest.raises(UserError) as caught:
        read_splits(DataConfig(path="owner/rows"))
    assert str(caught.value) == (
        "no file or folder 'owner/rows', and reading it from the Hugging Face Hub failed: Couldn't reach the Hub"
    )


@pytest.mark.parametrize(
    ("learned", "tested", "kept"),
    [
        (["0", "1"], ["-1", "-1"], False),
        ([0, 1], [-1, -1], False),
        (["a", "b"], [None, ""], False),
        (["a", "b"], ["nan", "nan"], True),
        (["1", "-1"], ["-1", "-1"], True),  # a label like any other
        ([0, 1], [-1, 1], True),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_test_split_without_labels_is_left_out(tmp_path, learned, tested, kept, kind):
    write_rows(tmp_path / f"train.{kind}", [{"text": "a", "label": label} for label in learned * 4])
    write_rows(tmp_path / f"test.{kind}", [{"text": "a", "label": label} for label in tested])
    assert ("test" in read_splits(DataConfig(path=str(tmp_path)))) is kept


def test_ultrafeedback_as_the_paper_learned_it(monkeypatch):
    """Its public form has a split for each kind of training, and the chosen answer as a chat."""
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    other = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Go away"}]
    rows = Dataset.from_dict(
        {"prompt": ["Hi"] * 6, "chosen": [chat] * 6, "rejected": [other] * 6, "messages": [chat] * 6}
    )
    names = ("train_prefs", "train_sft", "test_prefs", "test_sft", "train_gen", "test_gen")
    found = DatasetDict({name: rows.select(range(index + 1)) for index, name in enumerate(names)})
    monkeypatch.setattr(data_module, "load_dataset", lambda *_: found)
    config = DataConfig(path="HuggingFaceH4/ultrafeedback_binarized", validation_fraction=0.5)
    task, splits = read_data("instruction", config)  # all prompts are the same, and one row validates nevertheless
    assert {name: len(split) for name, split in splits.items()} == {"train": 1, "validation": 1, "test": 4}
    assert task.columns == {"messages": "messages"}


def test_read_evaluation_prefers_test(tmp_path):
    with pytest.raises(UserError, match="standard input can only be predicted: to score rows, give them in a file"):
        read_evaluation("-")
    assert len(read_evaluation(write_rows(tmp_path / "rows.csv", ROWS))) == 20
    write_rows(tmp_path / "train.csv", ROWS)
    write_rows(tmp_path / "val.csv", ROWS[:6])
    assert len(read_evaluation(str(tmp_path))) == 6
    write_rows(tmp_path / "test.csv", ROWS[:4])
    assert len(read_evaluation(str(tmp_path))) == 4


def test_config_refuses_unknown_fields_and_no_data():
    with pytest.raises(ValidationError, match="tekst"):
        DataConfig(path="x", tekst="sentence")
    with pytest.raises(ValidationError, match="no data: give `path`, `train` or `mix`"):
        DataConfig(text="sentence")
    assert all(field.description for field in DataConfig.model_fields.values())
