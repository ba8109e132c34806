"""Commands that let language models answer, and score them, as the paper's Llama-2 experiments do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from redpeft.cli.command import Answer, command
from redpeft.console import counted


@command("redpeft generate alpaca-eval runs/chat --questions alpaca_eval.json --out answers/chat.json")
def generate(
    benchmark: Annotated[
        Literal["alpaca-eval", "mt-bench"],
        typer.Argument(
            metavar="alpaca-eval|mt-bench", help="Decides the format of questions and answers.", show_default=False
        ),
    ],
    model: Annotated[str, typer.Argument(help="A run folder, a model folder, or a name on the Hub.")],
    questions: Annotated[Path, typer.Option(help="AlpacaEval's alpaca_eval.json, or FastChat's question.jsonl.")],
    out: Annotated[Path, typer.Option(help="The file to write; the same command again goes on from a kill.")],
    adapter: Annotated[
        Path | None, typer.Option(help="An adapter on MODEL: its folder, or the run folder around it.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What the benchmark is to call the model.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Questions answered together.")] = 8,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 768,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", min=1.0, help="Holds back tokens seen before; 1: not.")
    ] = 1.1,
    no_repeat_ngrams: Annotated[
        int, typer.Option("--no-repeat-ngrams", min=0, help="No sequence of so many tokens comes twice; 0: it may.")
    ] = 5,
) -> Answer:
    """Answer the questions of AlpacaEval or MT-Bench, decoding greedily as the paper does, for their own judges."""
    from redpeft.evaluation.generate import generate
    from redpeft.evaluation.language_model import Decoding

    decoding = Decoding(max_new_tokens, repetition_penalty, no_repeat_ngrams)
    done = generate(
        benchmark, model, questions, out, adapter=adapter, name=name, decoding=decoding, batch_size=batch_size
    )
    return Answer(done, [f"{counted(done['questions'], 'answer')} of {done['model']}: {out}"])


@command("redpeft lm-eval meta-llama/Llama-2-7b-hf --adapter runs/red --tasks open-llm-leaderboard --out scores.json")
def lm_eval(
    base: Annotated[str, typer.Argument(help="The base model: a folder, or a name on the Hub.", show_default=False)],
    tasks: Annotated[str, typer.Option(help="Tasks or groups of lm-eval, as gsm8k,mmlu; or open-llm-leaderboard.")],
    out: Annotated[Path, typer.Option(help="The JSON file to write; the same command again goes on from a kill.")],
    adapter: Annotated[
        list[str] | None, typer.Option(help="An adapter folder, or the run folder around it; may be given again.")
    ] = None,
    with_base: Annotated[bool, typer.Option("--with-base", help="Score the base model alone too.")] = False,
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", min=0, help="Examples in a prompt, if not as the task says.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="A folder with task files of your own.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Requests computed together.")] = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many rows of each task: a try.")] = None,
) -> Answer:
    """Score adapters by EleutherAI's lm-evaluation-harness, all on one base model that is loaded once."""
    from redpeft.evaluation.lm_harness import evaluate_adapters, parse_tasks, results_table

    asked = parse_tasks(tasks, num_fewshot)
    result = evaluate_adapters(
        base,
        adapter or [],
        asked,
        out,
        with_base=with_base,
        include_path=include_path,
        batch_size=batch_size,
        limit=limit,
    )
    return Answer(result, [results_table(result, asked), f"Scores: {out}"])
