"""Commands that let language models answer, in a chat or as in the paper's Llama-2 experiments, and score them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import typer

from redpeft.cli.command import CommandOutput, command
from redpeft.console import counted


@command("redpeft chat runs/formal --adapter runs/brief")
def chat(
    model: Annotated[
        str, typer.Argument(help="A run folder, an adapter folder, or a base model.", show_default=False)
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="An adapter of the base model: its folder, or its run folder. Repeat it for more adapters."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system message, with which the chat begins.")] = None,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token.")] = 0.7,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Draw among the likeliest tokens that have this share together.")
    ] = 0.9,
    top_k: Annotated[int, typer.Option("--top-k", help="Draw among so many tokens at most; 0: no limit.")] = 0,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", help="Makes repeated tokens less likely; 1: no penalty.")
    ] = 1.0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer.")] = 512,
    seed: Annotated[int, typer.Option(help="The same seed and questions give the same answers.")] = 0,
    *,
    on_event: Callable[[dict[str, Any]], None] | None,
    stdout: TextIO,
) -> CommandOutput:
    """Talk to a model and its adapters in the terminal: switch, set strengths, mix. /help in the chat lists how."""
    from redpeft.evaluation.chat import chat

    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    sampling |= {"repetition_penalty": repetition_penalty, "max_new_tokens": max_new_tokens}
    done = chat(model, adapter or [], sampling, system=system, out=stdout, on_answer=on_event)
    return CommandOutput(done, [])


@command("redpeft studio runs --base smollm2")
def studio(
    folder: Annotated[Path, typer.Argument(help="A folder with adapters and runs.", show_default=False)],
    base: Annotated[
        str | None, typer.Option(help="The base model of the adapters that answer chats. Default: as they name it.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen at. A public one needs --auth.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860.")] = None,
    auth: Annotated[
        str | None,
        typer.Option(metavar="USER:PASSWORD", envvar="REDPEFT_STUDIO_AUTH", help="Who may open the page."),
    ] = None,
    *,
    on_event: Callable[[dict[str, Any]], None] | None,
) -> CommandOutput:
    """Show a page in the browser: compare the adapters of a folder, mix them, look into them. Needs gradio."""
    from redpeft.studio.web_page import show

    return CommandOutput(show(folder, base, host=host, port=port, auth=auth, on_event=on_event), [])


@command("redpeft generate alpaca-eval runs/chat --questions alpaca_eval.json --out answers/chat.json")
def generate(
    benchmark: Annotated[
        Literal["alpaca-eval", "mt-bench"],
        typer.Argument(
            metavar="alpaca-eval|mt-bench", help="Decides the format of questions and answers.", show_default=False
        ),
    ],
    model: Annotated[str, typer.Argument(help="A run folder, a model folder, a GGUF file, or a Hub name.")],
    questions: Annotated[Path, typer.Option(help="AlpacaEval's alpaca_eval.json, or FastChat's question.jsonl.")],
    out: Annotated[Path, typer.Option(help="The file to write. After a kill the same command continues.")],
    adapter: Annotated[Path | None, typer.Option(help="An adapter of MODEL: its folder, or its run folder.")] = None,
    name: Annotated[str | None, typer.Option(help="The name of the model in the answers.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Questions answered together.")] = 8,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 768,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", min=1.0, help="Makes repeated tokens less likely; 1: no penalty.")
    ] = 1.1,
    no_repeat_ngrams: Annotated[
        int,
        typer.Option("--no-repeat-ngrams", min=0, help="No sequence of this many tokens appears twice; 0: no limit."),
    ] = 5,
) -> CommandOutput:
    """Answer the questions of AlpacaEval or MT-Bench with greedy decoding as in the paper, for their own judges."""
    from redpeft.evaluation.generate import generate
    from redpeft.evaluation.language_model import Decoding

    decoding = Decoding(max_new_tokens, repetition_penalty, no_repeat_ngrams)
    done = generate(
        benchmark, model, questions, out, adapter=adapter, name=name, decoding=decoding, batch_size=batch_size
    )
    return CommandOutput(done, [f"{counted(done['questions'], 'answer')} of {done['model']}: {out}"])


@command("redpeft lm-eval meta-llama/Llama-2-7b-hf --adapter runs/red --tasks open-llm-leaderboard --out scores.json")
def lm_eval(
    base: Annotated[str, typer.Argument(help="The base model: a folder, GGUF file or Hub name.", show_default=False)],
    tasks: Annotated[
        str, typer.Option(help="Tasks or groups of lm-eval, such as gsm8k,mmlu; or open-llm-leaderboard.")
    ],
    out: Annotated[Path, typer.Option(help="The JSON file to write. After a kill the same command continues.")],
    adapter: Annotated[
        list[str] | None, typer.Option(help="An adapter folder, or its run folder. Repeat it for more adapters.")
    ] = None,
    with_base: Annotated[
        bool, typer.Option("--with-base", help="Also score the base model without an adapter.")
    ] = False,
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", min=0, help="Examples in each prompt. Default: what the task says.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="A folder with task files of your own.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Requests computed together.")] = 8,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Score only this many rows of each task, as a test.")
    ] = None,
) -> CommandOutput:
    """Score adapters with EleutherAI's lm-evaluation-harness. Their base model is loaded once."""
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
    return CommandOutput(result, [results_table(result, asked), f"Scores: {out}"])
