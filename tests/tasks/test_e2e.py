from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from transformers import AutoTokenizer

from helpers import tasks as helper
from helpers.data import write, write_rows
from redpeft.errors import UserError
from redpeft.tasks.base import DataConfig, task_from_dict
from redpeft.tasks.data import read_data, read_splits
from redpeft.tasks.e2e import MR_TOKENS, REFERENCE_TOKENS, E2ETask, read_predictions, read_references, score_files
from redpeft.tasks.files import read_file

ROWS = {
    "mr": ["name[Cotto]", "name[Aromi], area[riverside]", "name[Cotto]"],
    "ref": ["Cotto is a place.", "Aromi, in the riverside area.", "There is Cotto."],
}

make = partial(helper.make, source="trainset.csv")
task_of = partial(helper.task_of, E2ETask, source="trainset.csv")
error_of = partial(helper.error_of, E2ETask, source="trainset.csv")


@pytest.fixture
def tokenizer(tiny_gpt2_folder):
    return AutoTokenizer.from_pretrained(tiny_gpt2_folder)


@pytest.fixture
def llama_tokenizer(tiny_decoder_folder):
    """It begins a text with <s>, and has a token for each byte."""
    return AutoTokenizer.from_pretrained(tiny_decoder_folder)


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        (["mr", "ref"], ("mr", "ref")),
        (["human_reference", "meaning_representation"], ("meaning_representation", "human_reference")),
        (["MR", "Ref"], ("MR", "Ref")),
        (["gem_id", "meaning_representation", "target"], ("meaning_representation", "target")),
    ],
)
def test_columns_are_guessed(columns, found):
    task = task_of({name: ["a", "b"] for name in columns})
    assert (task.columns["prompt"], task.columns["response"]) == found
    assert (task.metric, task.greater_is_better, task.compute_metrics) == ("loss", False, None)


def test_columns_that_are_named_or_missing():
    rows = {"data": ["a"], "say": ["b"]}
    assert task_of(rows, {"prompt": "data", "response": "say"}).columns == {"prompt": "data", "response": "say"}
    assert error_of(rows) == (
        "cannot tell which column of trainset.csv is the prompt (columns: data, say); name it with `prompt`"
    )
    assert "is the response (columns: mr, say); name it with `response`" in error_of({"mr": ["a"], "say": ["b"]})
    assert "has no column 'meaning'; its columns are mr, ref." in error_of(ROWS, {"prompt": "meaning"})
    assert error_of(ROWS, metric="bleu") == "no metric 'bleu' for this task; it has loss"
    assert error_of({**ROWS, "ref": ["a", " ", "c"]}) == "trainset.csv, row 2: the text in column 'ref' is empty"
    assert error_of({**ROWS, "mr": ["a", "b", None]}) == "trainset.csv, row 3: the text in column 'mr' is empty"


def test_the_public_files_by_their_names(e2e_folder):
    splits = read_splits(DataConfig(path=str(e2e_folder)))
    assert {name: len(split) for name, split in splits.items()} == {"train": 24, "validation": 8, "test": 8}
    assert E2ETask.from_splits(splits, DataConfig(path="x")).columns == {"prompt": "mr", "response": "ref"}


def test_a_test_split_needs_the_packages_that_score_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    splits = {"train": make(ROWS), "validation": make(ROWS)}
    E2ETask.from_splits(splits, DataConfig(path="x"))
    with pytest.raises(UserError, match=r"the scores of E2E need sacrebleu: pip install redpeft\[e2e\]"):
        E2ETask.from_splits({**splits, "test": make(ROWS)}, DataConfig(path="x"))


def test_what_is_learned(tokenizer):
    """`MR <eos> text <eos>`, with the loss on what follows the first <eos>."""
    encoded = task_of(ROWS).encode(make(ROWS), tokenizer, 256)
    end = tokenizer.eos_token_id
    for row, mr, ref in zip(encoded, ROWS["mr"], ROWS["ref"], strict=True):
        prompt, text = (tokenizer.backend_tokenizer.encode(part).ids for part in (mr, ref))
        assert row["input_ids"] == [*prompt, end, *text, end]
        assert row["labels"] == [*[-100] * (len(prompt) + 1), *text, end]
    assert tokenizer.decode(encoded[0]["input_ids"]) == "name[Cotto]<|endoftext|>Cotto is a place.<|endoftext|>"
    asked = task_of(ROWS).encode(make(ROWS).remove_columns("ref"), tokenizer, 256, with_labels=False)
    assert set(asked.column_names) == {"input_ids", "__cut__"}
    assert tokenizer.decode(asked[0]["input_ids"]) == "name[Cotto]<|endoftext|>"


def test_a_tokenizer_that_marks_the_beginning(llama_tokenizer):
    encoded = task_of(ROWS).encode(make(ROWS), llama_tokenizer)
    assert llama_tokenizer.decode(encoded[0]["input_ids"]) == "<s>name[Cotto]</s>Cotto is a place.</s>"
    learned = [token for token in encoded[0]["labels"] if token != -100]
    assert llama_tokenizer.decode(learned) == "Cotto is a place.</s>"


def test_a_tokenizer_that_marks_the_end(llama_tokenizer):
    from tokenizers import processors

    llama_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", llama_tokenizer.eos_token_id)]
    )
    encoded = task_of(ROWS).encode(make(ROWS), llama_tokenizer)
    assert llama_tokenizer.decode(encoded[0]["input_ids"]) == "name[Cotto]</s>Cotto is a place.</s>"


def test_long_rows_are_cut(llama_tokenizer):
    rows = {"mr": ["m" * 300, "m" * (MR_TOKENS - 2)], "ref": ["r" * 300, "r" * (REFERENCE_TOKENS - 1)]}
    cut, whole = task_of(rows).encode(make(rows), llama_tokenizer, 256)
    assert (cut["__cut__"], whole["__cut__"]) == (True, False)
    end = llama_tokenizer.eos_token_id
    assert cut["input_ids"][MR_TOKENS - 1] == end  # where the text begins is said all the same
    assert cut["labels"][:MR_TOKENS] == [-100] * MR_TOKENS
    assert len(cut["input_ids"]) == len(cut["labels"]) == MR_TOKENS + REFERENCE_TOKENS
    assert end not in cut["labels"]  # the text does not end where it is cut
    assert whole["input_ids"].index(end) == MR_TOKENS - 1
    assert len(whole["input_ids"]) == MR_TOKENS + REFERENCE_TOKENS
    assert whole["labels"][-1] == end
    [short, _] = task_of(rows).encode(make(rows), llama_tokenizer, 80)
    assert (len(short["input_ids"]), short["__cut__"]) == (80, True)
    assert [label for label in short["labels"] if label != -100] == short["input_ids"][MR_TOKENS:]


def test_what_cannot_be_learned(tokenizer):
    with pytest.raises(
        UserError, match="^64 tokens leave no room for a text after an MR of up to 64: raise max_length, or take a"
    ):
        task_of(ROWS).encode(make(ROWS), tokenizer, 64)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="the task e2e needs a tokenizer with an end token"):
        task_of(ROWS).encode(make(ROWS), tokenizer)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_to_learn_and_to_continue(tokenizer, side):
    """Positions count from the left: rows to learn are padded behind, and rows to continue before."""
    tokenizer.padding_side = side
    task = task_of(ROWS)
    collate = task.collator(tokenizer)
    assert tokenizer.padding_side == side
    assert tokenizer.pad_token == tokenizer.eos_token
    rows = list(task.encode(make(ROWS), tokenizer, 256))
    batch = collate(rows)
    parts = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
    for row, ids, mask, labels in zip(rows, *parts, strict=True):
        length = len(row["input_ids"])
        assert ids[:length].tolist() == row["input_ids"]
        assert mask.tolist() == [1] * length + [0] * (len(ids) - length)
        assert labels.tolist() == row["labels"] + [-100] * (len(ids) - length)
    asked = list(task.encode(make(ROWS), tokenizer, 256, with_labels=False))
    batch = collate(asked)
    assert set(batch) == {"input_ids", "attention_mask"}
    for row, ids, mask in zip(asked, batch["input_ids"], batch["attention_mask"], strict=True):
        length = len(row["input_ids"])
        assert ids[-length:].tolist() == row["input_ids"]
        assert mask.tolist() == [0] * (len(ids) - length) + [1] * length


def test_the_loss_is_that_of_the_texts_tokens(tiny_gpt2_folder, tokenizer):
    task = task_of(ROWS)
    model = task.load_model(tiny_gpt2_folder, tokenizer).eval()
    rows = list(task.encode(make(ROWS), tokenizer, 256))
    losses = []
    with torch.no_grad():
        for row, mr in zip(rows, ROWS["mr"], strict=True):  # alone, without padding, token by token
            begin = len(tokenizer(mr)["input_ids"])
            ids = torch.tensor(row["input_ids"])
            chances = model(ids[None]).logits[0].log_softmax(-1)
            losses += [-chances[at, ids[at + 1]] for at in range(begin, len(ids) - 1)]
        together = model(**task.collator(tokenizer)(rows)).loss
    assert together == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


def test_the_model_ends_where_its_tokenizer_does(tiny_gpt2_folder, tokenizer):
    model = task_of(ROWS).load_model(tiny_gpt2_folder, tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == model.config.pad_token_id == tokenizer.pad_token_id


def test_each_mr_is_asked_once_in_the_order_of_the_file():
    task, dataset = task_of(ROWS), make(ROWS)
    assert task.questions(dataset)["mr"] == ROWS["mr"][:2]
    assert task.references(dataset) == [["Cotto is a place.", "There is Cotto."], ["Aromi, in the riverside area."]]
    answered = {"name[Aromi], area[riverside]"}
    assert task.unanswered(dataset, answered) == [0]
    assert task.unanswered(dataset, answered) == []
    assert answered == set(ROWS["mr"])


def test_answers_are_scored_against_all_texts_of_their_mr(monkeypatch):
    monkeypatch.setattr("redpeft.tasks.metrics.has_java", lambda: False)
    task, dataset = task_of(ROWS), make(ROWS)
    scores = task.score_answers([" There is\nCotto.\n\nAnd more", "Aromi, in the riverside area."], dataset)
    assert scores["bleu"] == pytest.approx(100)
    swapped = task.score_answers(["Aromi, in the riverside area.", "There is Cotto."], dataset)
    assert swapped["bleu"] < 20


def test_generated_texts_become_one_line():
    texts = [" Cotto  is\n a place.\n", "\n\nCotto.\n\nname[", ""]
    assert task_of(ROWS).decode(texts) == [{"text": "Cotto is a place."}, {"text": "Cotto."}, {"text": ""}]


def test_rows_to_answer():
    task = task_of(ROWS)
    assert task.rows_to_dataset(["name[Cotto]", {"mr": "name[Aromi]", "ref": "left out"}])["mr"] == [
        "name[Cotto]",
        "name[Aromi]",
    ]
    with pytest.raises(UserError, match="row 1 has no 'mr'; it has 'data'"):
        task.rows_to_dataset([{"data": "name[Cotto]"}])


def test_a_task_survives_its_json():
    task = task_of(ROWS)
    assert task_from_dict(json.loads(json.dumps(task.to_dict()))) == task


@pytest.mark.parametrize("name", ["e2e", "e2e_cleaned"])
def test_shared_data(shared_data, tokenizer, name):
    config = DataConfig(path=str(shared_data / name), max_train_rows=50, max_eval_rows=50)
    task, splits = read_data("e2e", config)
    assert task.columns == {"prompt": "meaning_representation", "response": "human_reference"}
    assert len(task.encode(splits["train"], tokenizer, 256)) == len(splits["train"]) in range(40, 51)


# --- files of predictions and references ----------------------------------------------------------------------------

TABLE = [
    {"mr": "name[Cotto]", "ref": "Cotto is a pub."},
    {"mr": "name[Zizzi], area[riverside]", "ref": "Zizzi, by the river."},
    {"mr": "name[Zizzi], area[riverside]", "ref": "By the river is Zizzi."},
    {"mr": "name[Cotto]", "ref": "There is a pub, Cotto."},
]
GROUPS = [["Cotto is a pub.", "There is a pub, Cotto."], ["Zizzi, by the river.", "By the river is Zizzi."]]
TEXT = "\n\n".join("\n".join(group) for group in GROUPS)


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_a_table_of_references_is_grouped_by_what_they_say(tmp_path, kind):
    assert read_references(write_rows(tmp_path / f"refs{kind}", TABLE)) == GROUPS


def test_the_columns_of_other_releases(tmp_path):
    rows = [{"meaning_representation": row["mr"], "human_reference": row["ref"]} for row in TABLE]
    assert read_references(write_rows(tmp_path / "refs.jsonl", rows)) == GROUPS


@pytest.mark.parametrize("ending", ["", "\n", "\n\n", "\n\n\n", "\r\n\r\n"])
def test_groups_of_lines(tmp_path, ending):
    assert read_references(write(tmp_path / "label.txt", TEXT + ending)) == GROUPS
    assert read_references(write(tmp_path / "windows.txt", TEXT.replace("\n", "\r\n") + ending)) == GROUPS


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_predictions_one_a_line(tmp_path, ending):
    assert read_predictions(write(tmp_path / "pred.txt", "\ufeffOne.\nTwo: café." + ending)) == ["One.", "Two: café."]


def test_predictions_as_predict_writes_them(tmp_path):
    rows = [{"mr": "name[Cotto]", "text": "A pub."}, {"id": 3, "text": ""}]
    assert read_predictions(write(tmp_path / "p.jsonl", "".join(json.dumps(row) + "\n" for row in rows))) == [
        "A pub.",
        "",  # what a poor model may say; it is scored
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pred.txt", "", "pred.txt is empty: it holds no rows"),
        ("pred.txt", " \n\n", "pred.txt is empty: it holds no rows"),
        ("pred.jsonl", "", "pred.jsonl is empty: it holds no rows"),
        ("pred.txt", "One.\n\nTwo.\n", "pred.txt, line 2: the line is empty"),
        ("pred.txt", "One.\nTwo.\n\n", "pred.txt, line 3: the line is empty"),
        ("pred.txt", "\nOne.", "pred.txt, line 1: the line is empty"),
        ("pred.txt", b"PK\x03\x04", "pred.txt is not a text file: it is an Excel workbook or another zip archive"),
        ("pred.jsonl", b'{"text": "Caf\0"}\n', "pred.jsonl, line 1: it holds NUL bytes"),
        ("pred.jsonl", '{"mr": "a"}\n', "pred.jsonl has no column 'text'; its columns are mr."),
        ("pred.jsonl", '{"text": "a"}\n{"text": null}\n', "pred.jsonl, row 2: column 'text' holds None, which is not"),
        ("pred.jsonl", '{"text": "a"}\n{"text"\n', "pred.jsonl, line 2: broken JSON"),
    ],
)
def test_bad_predictions(tmp_path, name, content, message):
    with pytest.raises(UserError) as caught:
        read_predictions(write(tmp_path / name, content))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("label.txt", "\n", "label.txt is empty: it holds no rows"),
        ("label.txt", "One.\n\n\nTwo.\n", "label.txt, line 3: the line is empty"),
        ("label.txt", "\nOne.\n", "label.txt, line 1: the line is empty"),
        ("label.txt", b"%PDF-1.7\n", "label.txt is not a text file: it is a PDF file"),
        ("refs.csv", "mr,text\na,b\n", "cannot tell which column of refs.csv is the response (columns: mr, text)"),
        ("refs.csv", "mr,ref\na,b\nc,\n", "refs.csv, row 2: the text in column 'ref' is empty"),
    ],
)
def test_bad_references(tmp_path, name, content, message):
    with pytest.raises(UserError) as caught:
        read_references(write(tmp_path / name, content))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there_or_differ_in_length(tmp_path):
    references, predictions = write(tmp_path / "label.txt", TEXT), write(tmp_path / "pred.txt", "One.\nTwo.\nThree.\n")
    with pytest.raises(UserError) as caught:
        score_files(references, predictions)
    assert str(caught.value) == (
        f"{predictions} holds 3 predictions and {references} the references of 2 meaning representations: one "
        "prediction for each is needed, in their order"
    )
    for pair in ((tmp_path / "none.txt", predictions), (references, tmp_path / "none.jsonl"), (tmp_path, predictions)):
        with pytest.raises(UserError, match="^no such file: |is a folder, but a file is needed here$"):
            score_files(*pair)


def test_the_released_references_are_those_of_the_public_file(shared_data):
    official = shared_data.parent / "official_red" / "GPT-2" / "gpt2_medium" / "generation" / "label.txt"
    if not official.is_file():
        pytest.skip("no ../shared/official_red beside the repository")
    rows = read_file(shared_data / "e2e" / "test.jsonl")
    groups = read_references(shared_data / "e2e" / "test.jsonl")
    assert len(E2ETask(E2ETask.find_columns(rows)).questions(rows)) == len(groups) == 630
    released = read_references(official)
    letters = [[["".join(text.split()) for text in group] for group in each] for each in (groups, released)]
    assert letters[0] == letters[1]  # the released ones went through a tokenizer, which dropped spaces before commas
