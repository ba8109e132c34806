from __future__ import annotations

import json

import pytest

from helpers.data import write_rows
from redpeft.errors import UserError
from redpeft.runs.job_list import JobEntry, jobs_of_entries, read_entries


@pytest.fixture
def jobs_file(tmp_path):
    """Write JSON lines of jobs: objects, or texts as they are."""

    def write(*lines):
        path = tmp_path / "jobs.jsonl"
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return path

    return write


def test_a_line_is_a_job(jobs_file):
    path = jobs_file(
        {"data": {"path": "a.csv", "label": "l"}, "learning_rate": 0.1},
        "",
        {"data.path": "b.csv", "name": "b", "group": "g"},
    )
    assert read_entries(path) == [
        JobEntry("job-1", {"data.path": "a.csv", "data.label": "l", "learning_rate": 0.1}, f"{path}, line 1"),
        JobEntry("b", {"data.path": "b.csv"}, f"{path}, line 3", "g"),
    ]


def test_jobs_without_a_task_have_the_one_of_the_first_ones_data(jobs_file, tmp_path, tiny_decoder_folder, caplog):
    pytest.importorskip("trl")
    caplog.set_level("INFO")
    for name in "abc":
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": "Hi", "response": name}])
    entries = [{"data.path": str(tmp_path / f"{name}.jsonl")} for name in "abc"]
    entries[0]["task"] = "e2e"
    path = jobs_file(*entries)
    with pytest.raises(UserError, match="task e2e cannot be trained in a fleet"):
        jobs_of_entries(read_entries(path), None, [f"base={tiny_decoder_folder}"], tmp_path / "out")
    jobs, _ = jobs_of_entries(read_entries(path)[1:], None, [f"base={tiny_decoder_folder}"], tmp_path / "out")
    assert [(job.recipe.task, job.recipe.max_length) for job in jobs] == [("instruction", 2048)] * 2
    assert [message for message in caplog.messages if "the task is" in message] == [
        "b.jsonl has the columns prompt, response: the task is instruction; task=... overrides this"
    ]


def test_jobs_take_from_recipe_and_fields_what_they_do_not_say(jobs_file, tmp_path, tiny_encoder_folder):
    (tmp_path / "r.yaml").write_text(
        f"base: {tiny_encoder_folder}\ndata: {{path: r.csv, label: l}}\nepochs: 7\nseed: 3\n"
    )
    path = jobs_file({"name": "a", "data.path": "a.csv"}, {"name": "b", "epochs": 1, "group": 5})
    jobs, groups = jobs_of_entries(read_entries(path), str(tmp_path / "r.yaml"), ["epochs=9"], tmp_path / "out")
    assert [(job.folder.name, job.recipe.data.path, job.recipe.data.label, job.recipe.epochs) for job in jobs] == [
        ("a", "a.csv", "l", 9),
        ("b", "r.csv", "l", 1),
    ]
    assert {job.recipe.seed for job in jobs} == {3}
    assert groups == {tmp_path / "out" / "b": 5}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "jobs.jsonl is empty: it holds no jobs"),
        (["{}", "{"], "jobs.jsonl, line 2: broken JSON"),
        (["[1]"], "line 1: a job must be an object of recipe fields, not '[1]'"),
        (['{"name": "a"}', '{"name": "a"}'], "line 2: the name 'a' is also that of "),
        (['{"name": "job-2"}', "{}"], "line 2: the name 'job-2' is also that of "),
        (['{"name": "a/b"}'], "line 1: name must be a folder name, not 'a/b'"),
        (['{"name": ".."}'], "line 1: name must be a folder name"),
        (['{"name": ""}'], "line 1: name must be a folder name"),
        (['{"name": 7}'], "line 1: name must be a folder name, not 7"),
        (['{"group": [1]}'], "line 1: group must be a text, not [1]"),
        (['{"seeds": [1]}'], "line 1: seeds cannot be set for jobs of a fleet"),
        (['{"output": "a"}'], "line 1: output cannot be set for jobs of a fleet"),
    ],
)
def test_lines_that_are_no_jobs(jobs_file, lines, message):
    with pytest.raises(UserError) as error:
        read_entries(jobs_file(*lines))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"epoch": 1}, "line 2: unknown key 'epoch': did you mean 'epochs'?"),
        ({"batch_size": 0}, "line 2: batch_size: "),
        ({"base.model": "nowhere/at/all"}, "line 2: no such model folder"),
        ({"method_options": {"sties": "ffn"}}, "has no 'sties'"),
        ({"method": "lora"}, "line 2: method lora cannot be trained in a fleet; use redpeft train or redpeft sweep"),
    ],
)
def test_recipes_are_checked_with_the_line(jobs_file, tmp_path, tiny_encoder_folder, job, message):
    entries = read_entries(jobs_file({}, job))
    with pytest.raises(UserError) as error:
        jobs_of_entries(entries, None, [f"base={tiny_encoder_folder}", "data.path=a.csv"], tmp_path)
    assert message in str(error.value)


def test_a_folder_has_a_job_for_each_file_or_data_set(tmp_path, rows, capsys):
    folder = tmp_path / "customers"
    rows(folder / "b.jsonl", 4)
    rows(folder / "a" / "train.jsonl", 4)
    rows(folder / "a" / "test.jsonl", 4)
    rows(folder / "other" / "numbers.jsonl", 4)
    rows(folder / ".hidden.jsonl", 4)
    (folder / "README.md").write_text("What this is.")
    entries = read_entries(folder)
    assert [(entry.name, entry.fields["data.path"]) for entry in entries] == [
        ("a", str(folder / "a")),
        ("b", str(folder / "b.jsonl")),
    ]
    said = capsys.readouterr().err
    assert said == f"{folder / 'other'} is left out: it holds no train, validation or test file\n"
    (folder / "b.csv").write_text("text,label\nx,y\n")
    with pytest.raises(UserError, match=r"b.jsonl: the name 'b' is also that of .*b.csv"):
        read_entries(folder)


def test_a_folder_of_something_else(tmp_path, rows):
    with pytest.raises(UserError, match="no such file or folder: .*nowhere"):
        read_entries(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no data: no file .*.csv.* and no folder with train"):
        read_entries(tmp_path)
    rows(tmp_path / "train.jsonl", 4)
    with pytest.raises(UserError, match="holds the data of one job .train.: use redpeft train"):
        read_entries(tmp_path)
    (tmp_path / "jobs.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="is not a list of jobs"):
        read_entries(tmp_path / "jobs.csv")
