from __future__ import annotations

import statistics

import pytest

from redpeft.errors import UserError
from redpeft.reproduce.published import Column, find_table, tables


def test_every_row_of_the_paper_with_as_many_scores_as_columns():
    assert list(tables()) == [
        *("glue-roberta-base", "glue-roberta-large", "glue-t5-base", "e2e-gpt2-medium", "e2e-gpt2-large", "rank-1"),
        *("ablation", "alpaca-eval", "mt-bench", "open-llm"),
    ]
    counts = {name: sum(row.is_published for row in table.rows.values()) for name, table in tables().items()}
    assert list(counts.values()) == [8, 4, 6, 7, 7, 4, 3, 3, 3, 3]
    for table in tables().values():
        for row in table.rows.values():
            assert not row.scores or tuple(row.scores) == table.columns
            assert not row.deviations or tuple(row.deviations) == table.columns


@pytest.mark.parametrize("name", ["glue-roberta-base", "glue-roberta-large", "glue-t5-base", "open-llm"])
def test_printed_averages_are_those_of_the_columns(name):
    """Within what rounding allows: a tenth, and RED+ large (88.275 is printed as 88.3)."""
    for row in tables()[name].rows.values():
        if row.scores and row.average is not None:
            assert statistics.fmean(row.scores.values()) == pytest.approx(row.average, abs=0.101), row.name


def test_seeds_of_a_task_and_how_many_of_the_best_count():
    table = find_table("glue-roberta-base")
    assert table.seeds_of("sst2") == [42, 43, 44, 45, 46]
    assert table.seeds_of("mnli") == [42]
    assert table.seeds_of("cola") == list(range(42, 57))
    assert table.best == {"cola": 5, "rte": 5}
    t5 = find_table("glue-t5-base")
    assert (t5.seeds_of("rte"), t5.seeds_of("sst2"), t5.best) == (list(range(42, 51)), [42], {"cola": 3, "rte": 3})


def test_printed_parameters_are_read_as_numbers():
    rows = find_table("glue-roberta-base").rows
    assert rows["full"].parameter_count == 125e6
    assert rows["red"].parameter_count == pytest.approx(2e4)
    assert rows["head"].parameter_count is None


def test_a_table_has_as_many_decimals_as_printed():
    digits = {name: table.digits for name, table in tables().items()}
    assert (digits["glue-roberta-base"], digits["e2e-gpt2-medium"], digits["mt-bench"]) == (1, 2, 3)


def test_a_task_outside_the_table_is_a_column_of_its_own():
    glue, e2e = find_table("glue-roberta-base"), find_table("e2e-gpt2-medium")
    assert glue.columns_of(["cola", "ag_news"]) == [Column("cola"), Column("ag_news")]
    assert [column.metric for column in e2e.columns_of(["e2e_cleaned"])] == [
        "bleu",
        "nist",
        "meteor",
        "rouge_l",
        "cider",
    ]
    assert e2e.columns_of(["e2e"])[0].name(True) == "bleu"
    assert e2e.columns_of(["e2e"])[0].name(False) == "e2e bleu"


def test_a_typo_names_the_nearest():
    with pytest.raises(UserError, match="there is no table glue-roberta-bse: did you mean glue-roberta-base?"):
        find_table("glue-roberta-bse")
    with pytest.raises(UserError, match=r"there is no table zzz: there are glue-roberta-base, .*--list"):
        find_table("zzz")
