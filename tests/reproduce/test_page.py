from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from itertools import dropwhile, takewhile

import pytest

from helpers.table_runs import asked, fake_run
from redpeft.reproduce.page import command_line, write_report
from redpeft.reproduce.plan import Request
from redpeft.reproduce.published import find_table
from redpeft.reproduce.report import as_data, make_report
from redpeft.runs import pages
from redpeft.runs.pages import Link

GLUE = find_table("glue-roberta-base")


@pytest.fixture
def report(tmp_path):
    for seed, score in ((42, 0.911), (43, 0.931)):
        fake_run(tmp_path, "red", "sst2", seed, {"accuracy": score})
    for seed in range(42, 57):
        fake_run(tmp_path, "red", "rte", seed, {"accuracy": 0.5 + seed / 1000})
    fake_run(tmp_path, "lora", "sst2", 42, {"accuracy": 0.925}, trainable_parameters=295912)
    fake_run(tmp_path, "top2", "sst2", 42, {"accuracy": 0.85})
    failing = asked(tmp_path, "lora", "rte", 42)
    runs = [asked(tmp_path, "red", "sst2", 42), failing, asked(tmp_path, "ia3", "sst2", 42)]
    request = Request(GLUE, tmp_path, rows=("red", "lora", "ia3"), changes={"epochs": 3})
    return make_report(request, runs, {failing.job.folder: "the loss is | not finite"})


def rows_of(markdown, heading):
    """The cells of the first table behind a heading."""
    lines = dropwhile(lambda line: not line.startswith("|"), markdown.split(heading, 1)[1].splitlines())
    table = takewhile(lambda line: line.startswith("|"), lines)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]


def test_the_table_shows_measured_beside_published(report):
    page = write_report(report)
    head, _, *rows = rows_of(page.with_suffix(".md").read_text(), "# GLUE")
    assert head == ["method", "trained / published", "sst2", "rte", "average"]
    found = {row[0]: row[1:] for row in rows}
    assert found["RED"] == [
        "384 / 0.02M",
        "[92.1 ± 1.4](<red/sst2>) / 93.9 ± 0.3",
        "[55.4 ± 0.2](<red/rte>) (best 5 of 15; all 54.9 ± 0.4) / 78.0 ± 2.1",
        "73.8 / 86.0",
    ]
    assert found["LoRA"] == [
        "294,912 / 0.3M",
        "[92.5](<lora/sst2/seed-42>) / 93.9",
        "[failed](<lora/rte>) / 75.3",
        "- / 84.6",
    ]
    assert found["IA3"] == ["- / 0.06M", "- / 93.4", "- / 73.5", "- / 83.5"]
    assert found["FT of the top 2 layers"] == ["384 / -", "[85.0](<top2/sst2/seed-42>) / -", "- / -", "- / -"]
    assert found["standard error of one run, from its test rows"][1] == "± 3.6"  # sqrt(.85 * .15 / 101), the largest
    assert list(found)[:3] == ["LoRA", "IA3", "RED"]  # the paper's order


def test_failures_runs_sources_and_machine_are_on_the_page(report):
    text = write_report(report).with_suffix(".md").read_text()
    [_, _, [run, error]] = rows_of(text, "## Failed runs")
    assert run.endswith("(<lora/rte/seed-42>)")
    assert error == r"the loss is \| not finite"
    assert len(rows_of(text, "## Runs")) == 2 + 19
    assert rows_of(text, "## Runs")[2] == [
        *("[lora, sst2, seed 42](<lora/sst2/seed-42>)", "92.5", "50.00 (accuracy)"),
        *("2", "0.03", "3", "295,912", "1.5"),
    ]
    assert ["RED", "the paper's appendix; the released scripts agree"] in rows_of(text, "## Where the settings")
    facts = dict(rows_of(text, "## Machine and versions")[2:])
    assert facts["torch"] == "2.9"
    assert {"processor", "memory", "gpu", "python"} <= set(facts)
    assert "redpeft reproduce glue-roberta-base epochs=3 --rows red,lora,ia3 --settings paper --out" in text
    assert "the mean of all seeds follows" in text


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("href", "src")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_html_page_is_well_formed_and_its_links_lead_somewhere(report):
    page = write_report(report)
    parser = Links()
    text = page.read_text()
    parser.feed(text)
    assert parser.open == []
    assert len(parser.found) > 20
    missing = [target for target in parser.found if not (page.parent / target).exists()]
    assert set(missing) == {"lora/rte", "lora/rte/seed-42"}  # the failed run never made its folder
    assert "<!doctype html>" in text
    assert '<a href="red/sst2">92.1 ± 1.4</a> / 93.9 ± 0.3' in text
    for kind in ("parameters", "columns"):
        assert (page.parent / f"glue-roberta-base-{kind}.png").read_bytes().startswith(b"\x89PNG")


def test_the_json_file_has_every_score_and_failure(report):
    write_report(report)
    data = json.loads((report.request.out / "glue-roberta-base.json").read_text())
    assert data == json.loads(json.dumps(as_data(report)))
    red = data["rows"]["red"]
    assert red["columns"]["sst2"]["scores"] == {"42": pytest.approx(91.1), "43": pytest.approx(93.1)}
    assert red["columns"]["sst2"]["published"] == 93.9
    assert red["columns"]["rte"]["best"] == 5
    assert red["published_average"] == pytest.approx((93.9 + 78.0) / 2)
    assert data["rows"]["lora"]["columns"]["rte"]["failed"] == {"42": "the loss is | not finite"}
    assert data["changes"] == {"epochs": 3}


def test_a_report_without_finished_runs_has_no_pictures(tmp_path):
    run = asked(tmp_path, "red", "sst2", 42)
    page = write_report(make_report(Request(GLUE, tmp_path), [run], {run.job.folder: "broke"}))
    assert "[failed](<red/sst2>)" in page.with_suffix(".md").read_text()
    assert not list(tmp_path.glob("*.png"))


def test_the_page_says_how_to_run_a_judge(tmp_path):
    fake_run(tmp_path, "red", "ultrafeedback", 42, None, metric="loss")
    report = make_report(Request(find_table("alpaca-eval"), tmp_path), [], {})
    text = write_report(report).with_suffix(".md").read_text()
    assert "## What is left to do" in text
    assert f"--questions FILE --out {tmp_path}/red/ultrafeedback/seed-42/alpaca-eval.json" in text


def test_the_page_shows_the_whole_command(tmp_path):
    request = Request(
        GLUE, tmp_path, tasks=("cola",), seeds=(1, 2), model="my model", settings="default", smoke=True,
        changes={"data.text": None}, row_changes={"red": {"method_options.unit": 1}},
    )  # fmt: skip
    assert command_line(request) == (
        "redpeft reproduce glue-roberta-base data.text=null red:method_options.unit=1 --tasks cola --seeds 1,2 "
        f"--model 'my model' --settings default --budget smoke --out {tmp_path}"
    )


def test_texts_are_escaped():
    blocks = [
        pages.Heading("a < b"),
        pages.Paragraph(["x & ", Link("y>", 'z"')]),
        pages.Code("1 < 2"),
        pages.Grid(["n", "v"], [[["a|b"], [Link("c", "d e")]]]),
    ]
    text = pages.to_html("T & U", blocks)
    assert "<title>T &amp; U</title>" in text
    assert "<h2>a &lt; b</h2>" in text
    assert '<p>x &amp; <a href="z%22">y&gt;</a></p>' in text
    assert '<pre><code class="language-text">1 &lt; 2\n</code></pre>' in text
    assert "| a\\|b | [c](<d e>) |" in pages.to_markdown(blocks)


def test_nothing_in_a_text_is_read_as_markdown():
    text = r"the *loss* of `n` is _not_ <b>finite</b> at f1_macro [x](y) | &amp; C:\new"
    block = pages.Grid(["run", "error"], [[[Link("a|b_", "50% a|b #1?")], [f"{text}\n# more"]]])
    parser = Links()
    page = pages.to_html("", [block])
    parser.feed(page)
    assert parser.found == ["50%25%20a%7Cb%20%231%3F"]
    assert html.unescape(page).count(f"{text} # more</td>") == 1
    assert ">a|b_</a>" in page
