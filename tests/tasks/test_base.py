from __future__ import annotations

import pytest

from redpeft.errors import UserError
from redpeft.tasks.base import TASKS, Task, task_from_dict


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_found_by_its_name_and_says_all_that_it_must(name):
    task = TASKS[name]
    assert issubclass(task, Task)
    assert task.name == name
    assert not task.__abstractmethods__
    assert all(isinstance(getattr(task, field), str) for field in ("task_type", "group"))
    assert isinstance(task.own_limits, str | property)  # of rewards it depends on the length of answers


@pytest.mark.parametrize("name", [name for name in TASKS if TASKS[name].default_columns])
@pytest.mark.parametrize("labels", [["a", "b"], ["a"]])
def test_an_adapter_without_its_run_has_a_task_that_is_saved_and_read(name, labels):
    task = TASKS[name].without_run(labels)
    assert task.columns == TASKS[name].default_columns
    assert task_from_dict(task.to_dict()) == task


def test_heads_of_one_shape():
    classification, tokens = TASKS["classification"], TASKS["token-classification"]
    two, other, three = (classification.without_run(labels) for labels in ("ab", "cd", "abc"))
    assert two.shape == other.shape != three.shape
    assert classification.without_run("a").head_labels == []  # a number
    assert list(tokens.without_run("ab").head_labels) == ["a", "b"]


@pytest.mark.parametrize("saved", [{}, {"task": "poetry"}, None, []])
def test_what_is_not_a_task_is_refused(saved):
    with pytest.raises(UserError, match=r"not a saved task: 'task' is .*, and the tasks are classification, token"):
        task_from_dict(saved)
