"""The studio's page, made with gradio, and the server that shows it.

The server answers this machine alone unless a password is set, and serves no files. The page asks no other machine for
anything: fonts and scripts come from gradio's own package, and its reports of use are off.
"""

from __future__ import annotations

import contextlib
import html
import ipaddress
import os
import socket
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from redpeft.console import counted, log_main
from redpeft.errors import RunError, UserError, first_line
from redpeft.evaluation.answers import Answer, Sampling, Weights, expression
from redpeft.studio.session import MOST, Entry, Session

try:
    import fastapi
    import uvicorn
    from starlette.datastructures import Headers
    from starlette.responses import PlainTextResponse

    # such a variable could share the page, serve files, or let others change the page's code
    for _name in [name for name in os.environ if name.startswith("GRADIO_") and name != "GRADIO_TEMP_DIR"]:
        del os.environ[_name]
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr
except ImportError as error:
    raise UserError("the studio needs gradio: pip install redpeft[studio]") from error

PORTS = range(7860, 7960)
HEAD = ["adapter", "status", "task", "method", "base", "score", "size", "written", "why it is damaged"]
OUTLIER_HEAD = ["what", "module", "channel", "differs by", "times the RMS there"]
# gradio's routes for files, foreign addresses and reports, none of which the page needs
CLOSED = ("/file=", "/file/", "/proxy=", "/upload", "/stream/", "/vibe", "/monitoring", "/run-history", "/deep_link")
BARS = 6  # of a classifier's labels


# --- the server ------------------------------------------------------------------------------------------------------


def show(
    folder: str | Path,
    base: str | None = None,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    auth: str | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Show the page until Ctrl-C; returns the folder, the base and the address.

    Args:
        folder: with adapters and runs.
        base: of the adapters that answer chats. Default: the one that they name.
        host: the address to listen at.
        port: default: the first free one from 7860 on.
        auth: `USER:PASSWORD`. Needed for a `host` that other machines can reach.
        on_event: gets the address once the page can be opened.

    Raises `UserError` as `Session` does, for a port that is taken, an address that cannot be listened at, and a public
    one without `auth`.
    """
    user, _, password = (auth or "").partition(":")
    if auth is not None and not (user and password):
        raise UserError("a name and a password are written as USER:PASSWORD")
    local = _is_loopback(host)
    if not local and auth is None:
        raise UserError(
            f"other machines can reach {host}: set a name and a password, REDPEFT_STUDIO_AUTH=USER:PASSWORD, or leave "
            "--host out"
        )
    session = Session(folder, base)
    with _listen(host, port) as listening:
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listening.getsockname()[1]}"
        app = fastapi.FastAPI(openapi_url=None)
        app.add_middleware(OnlyThePage, hosts={"localhost", host} if local else None)  # type: ignore[arg-type]
        gr.mount_gradio_app(
            app,
            Page(session).blocks,
            path="/",
            auth=(user, password) if auth else None,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            show_error=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            theme=gr.themes.Default(),
            css=STYLE,
        )
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        facts = {"folder": str(session.root), "base": session.base, "address": address}
        if on_event is not None:
            on_event(facts)
        log_main(f"The studio of {folder}: {address} (Ctrl-C ends)")
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listening])
        session.closed = True
    return facts


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int | None) -> socket.socket:
    """A socket at `port`, or at the first free one. Raises `UserError` where there is none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for each in PORTS if port is None else [port]:
        try:
            found = socket.create_server((host, each), family=family)
        except OSError as error:
            problem = error
            continue
        if port is None and each != PORTS[0]:
            log_main(f"port {PORTS[0]} is taken: {each} is used")
        return found
    what = f"port {port}" if port is not None else f"a port of {PORTS[0]} to {PORTS[-1]}"
    why = first_line(problem) if problem.strerror is None else problem.strerror.partition(" (")[0]
    raise UserError(f"cannot listen at {what} of {host}: {why}; choose another with --port")


class OnlyThePage:
    """Refuses what the page does not need: requests of other sites' pages, and gradio's routes for files and foreign
    addresses. `hosts`: the names of this server; None if others may know it by any name."""

    def __init__(self, app: Any, hosts: set[str] | None) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket"):
            headers = Headers(scope=scope)
            host, origin = headers.get("host", ""), headers.get("origin")
            foreign = origin is not None and urlsplit(origin).netloc != host
            unknown = self.hosts is not None and urlsplit(f"//{host}").hostname not in self.hosts
            if foreign or unknown or any(route in scope["path"] for route in CLOSED):
                await PlainTextResponse("refused", 403)(scope, receive, send)
                return
        await self.app(scope, receive, send)


# --- the page --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def sentences() -> Iterator[None]:
    """What goes wrong inside is a sentence on the page, and never a traceback there."""
    try:
        yield
    except (UserError, RunError) as error:
        problem = str(error)
    except Exception as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            problem = "there is not enough memory: choose fewer adapters, shorter answers or a smaller base model"
        else:
            traceback.print_exc()
            problem = f"an error of the studio itself, {type(error).__name__}: {first_line(error)}; see the terminal"
    else:
        return
    raise gr.Error(html.escape(problem), duration=None, title="This was not done", print_exception=False)


class Page:
    """The page of a session, `blocks`. Events that use a model take turns."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.lists: list[tuple[gr.Dropdown, Callable[[Entry], bool]]] = []  # and which adapters each offers
        base = f"Base model: `{session.base}`" if session.base else "No adapter here names the base model of a chat."
        with gr.Blocks(title=f"redpeft studio: {session.root.name}", analytics_enabled=False) as self.blocks:
            gr.Markdown(f"# {html.escape(session.root.name)}\n\n{html.escape(base)}")
            with gr.Row():
                temperature = gr.Slider(0, 2, 0.7, step=0.05, label="temperature", info="0: the likeliest token")
                tokens = gr.Slider(1, 1024, 128, step=1, label="longest answer, in tokens")
                seed = gr.Number(0, precision=0, minimum=0, label="seed", info="the same for all who answer")
                system = gr.Textbox("", label="system message")
            self.drawing = [temperature, tokens, seed, system]
            with gr.Tab("Adapters"):
                self.table = gr.Dataframe(headers=HEAD, interactive=False, wrap=True, label="in this folder")
                again = gr.Button("Look again", size="sm")
                self._curves()
            with gr.Tab("Compare"):
                self._compare()
            with gr.Tab("Mix"):
                saved = self._mix()
            with gr.Tab("Look inside"):
                self._look_inside()
            with gr.Tab("Classify"):
                self._classify()
            shown = [self.table, *(chooser for chooser, _ in self.lists)]
            for event in (self.blocks.load, again.click, saved.success):
                event(self.look, None, shown, show_progress="hidden")
        self.blocks.queue(max_size=64)

    def look(self) -> list[Any]:
        """The rows of the table, and what each list offers, after reading the folder."""
        with sentences():
            self.session.look()
        entries = self.session.entries
        rows = [_row(name, entry) for name, entry in entries.items()]
        return [rows, *(gr.update(choices=[n for n, e in entries.items() if fits(e)]) for _, fits in self.lists)]

    def _choose(self, label: str, fits: Callable[[Entry], bool], several: bool = False, **options: Any) -> gr.Dropdown:
        """A list of the adapters that fit."""
        many = {"multiselect": True, "max_choices": MOST, "value": []} if several else {"value": None}
        chooser = gr.Dropdown([], label=label, **many, **options)
        self.lists.append((chooser, fits))
        return chooser

    def _curves(self) -> None:
        run = self._choose("curves of a run", lambda entry: entry.run is not None)
        with gr.Row():
            plots = [gr.Plot(format="png", show_label=False) for _ in range(2)]

        def draw(name: str | None) -> list[Any]:
            with sentences():
                figures = self.session.curves(name) if name else []
                return [*figures, None, None][:2]

        run.change(draw, run, plots)

    # --- answers -----------------------------------------------------------------------------------------------------

    def _compare(self) -> None:
        who = self._choose(f"adapters, up to {MOST}", lambda entry: entry.answers, several=True)
        with_base = gr.Checkbox(True, label="the base model too")
        prompt = gr.Textbox("", label="prompt", placeholder="What all of them answer", lines=2)
        ask, stop = _buttons("Ask")
        answers = gr.HTML()

        def compare(prompt: str, who: list[str], with_base: bool, *drawing: Any) -> Iterator[str]:
            rows: list[Weights] = [*([{}] if with_base else []), *({name: 1.0} for name in who)]
            yield from self._answers(prompt, rows, drawing)

        inputs = [prompt, who, with_base, *self.drawing]
        event = gr.on([ask.click, prompt.submit], compare, inputs, answers, concurrency_id="model")
        stop.click(None, cancels=[event])

    def _mix(self) -> Any:
        """Returns the event after which the folder has one more adapter."""
        who, strengths = [], []
        with gr.Row():
            for at in range(MOST):
                with gr.Column(min_width=160):
                    who.append(self._choose(f"adapter {at + 1}", lambda e: e.answers and e.listed.method == "red"))
                    strengths.append(gr.Slider(-1, 2, 1 if at == 0 else 0, step=0.05, label=f"strength {at + 1}"))
        prompt = gr.Textbox(
            "", label="prompt for the mix", placeholder="Answered anew when a strength changes", lines=2
        )
        ask, stop = _buttons("Ask the base model and the mix")
        answers = gr.HTML()
        with gr.Row():
            name = gr.Textbox("", label="name of the new adapter", scale=3)
            save = gr.Button("Save the mix", scale=1)
        note = gr.Markdown()

        def weights(values: Sequence[Any]) -> dict[str, float]:
            chosen = [(each, float(by)) for each, by in zip(values[:MOST], values[MOST:], strict=True) if each and by]
            if len(dict(chosen)) < len(chosen):
                raise UserError("choose each adapter once")
            return dict(chosen)

        def mix(prompt: str, *values: Any) -> Iterator[str]:
            with sentences():
                rows = [{}, weights(values[: 2 * MOST])]
            yield from self._answers(prompt, rows, values[2 * MOST :])

        def mix_again(prompt: str, *values: Any) -> Iterator[str]:
            if prompt.strip():
                yield from mix(prompt, *values)

        def write(name: str, *values: Any) -> str:
            with sentences():
                mixed = weights(values)
                out = self.session.save(mixed, name.strip())
            return html.escape(f"Saved {expression(mixed)} as {out}")

        inputs = [prompt, *who, *strengths, *self.drawing]
        asked = gr.on([ask.click, prompt.submit], mix, inputs, answers, concurrency_id="model")
        moved = gr.on(
            [slider.release for slider in strengths],
            mix_again,
            inputs,
            answers,
            concurrency_id="model",
            trigger_mode="always_last",
        )
        stop.click(None, cancels=[asked, moved])
        return save.click(write, [name, *who, *strengths], note)

    def _answers(self, prompt: str, rows: Sequence[Weights], drawing: Sequence[Any]) -> Iterator[str]:
        """The answers side by side, again and again while they come."""
        *settings, system = drawing
        names = ("temperature", "max_new_tokens", "seed")
        with sentences():
            sampling = Sampling().changed(dict(zip(names, settings, strict=True)))
            for answers in self.session.answer(prompt, rows, sampling, system):
                columns = []
                for weights, found in zip(rows, answers, strict=True):
                    who = expression(weights) if weights else "the base model"
                    text = found.text if isinstance(found, Answer) else found
                    note = _how_long(found) if isinstance(found, Answer) else "..."
                    columns.append((who, f"<p>{html.escape(text)}</p>", note))
                yield _columns(columns)

    # --- what was learned --------------------------------------------------------------------------------------------

    def _look_inside(self) -> None:
        def is_red(entry: Entry) -> bool:
            return entry.listed.method == "red" and entry.listed.status == "ok"

        with gr.Row():
            adapter, other = (
                self._choose("adapter", is_red),
                self._choose("less another adapter (empty: itself)", is_red),
            )
        plot = gr.Plot(format="png", show_label=False)
        table = gr.Dataframe(headers=OUTLIER_HEAD, interactive=False, label="channels that stand out")

        def draw(name: str | None, other: str | None) -> tuple[Any, list[list[Any]]]:
            if not name:
                return None, []
            with sentences():
                figure, outliers = self.session.channels(name, other or None)
            units = {"scale": "scale", "bias": "bias, in units"}
            rows = [[units[o.vector], o.site, o.channel, f"{o.value:+.3g}", f"{o.times:.1f}"] for o in outliers]
            return figure, rows

        for chooser in (adapter, other):
            chooser.change(draw, [adapter, other], [plot, table])

    def _classify(self) -> None:
        gr.Markdown(
            "The base model has no head for these labels. Beside each RED adapter stands the same trained head on the "
            "base model's own output: the adapter with its edit off."
        )
        who = self._choose(f"classifiers, up to {MOST}", lambda entry: entry.labels, several=True)
        text = gr.Textbox("", label="text", lines=3)
        pair = gr.Textbox("", label="second text, for classifiers of pairs", lines=1)
        ask = gr.Button("Classify", variant="primary")
        labels = gr.HTML()

        def classify(text: str, pair: str, who: list[str]) -> str:
            with sentences():
                if not who:
                    raise UserError("choose a classifier")
                columns = []
                for name in who:
                    columns.append((name, _bars(self.session.label(name, text, pair)), ""))
                    if self.session.entries[name].listed.method == "red":
                        off = self.session.label(name, text, pair, edited=False)
                        columns.append((f"{name}, edit off", _bars(off), ""))
            return _columns(columns)

        gr.on([ask.click, text.submit], classify, [text, pair, who], labels, concurrency_id="model")


# --- as HTML ---------------------------------------------------------------------------------------------------------

STYLE = """
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 1rem }
.columns section { border: 1px solid var(--border-color-primary); border-radius: 0.4rem; padding: 0.7rem }
.columns h4 { margin: 0 0 0.4rem }
.columns p { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 }
.columns small { color: var(--body-text-color-subdued) }
.columns .bar { white-space: nowrap; padding: 0 0.3rem; margin: 0.15rem 0 }
.columns .bar { background: color-mix(in srgb, var(--color-accent) 30%, transparent) }
"""


def _columns(columns: Sequence[tuple[str, str, str]]) -> str:
    """Titles, contents as HTML and notes, side by side."""
    parts = (
        f"<section><h4>{html.escape(title)}</h4>{content}<small>{html.escape(note)}</small></section>"
        for title, content, note in columns
    )
    return f'<div class="columns">{"".join(parts)}</div>'


def _bars(answer: dict[str, Any]) -> str:
    """A classifier's answer: its labels from the likeliest on, each with a bar."""
    if "value" in answer:
        return f"<p>{answer['value']:.6g}</p>"
    ordered = sorted(answer["probabilities"].items(), key=lambda each: -each[1])
    more = f"<small>and {len(ordered) - BARS} more</small>" if len(ordered) > BARS else ""
    bars = (
        f'<div class="bar" style="width: {max(1, round(100 * share))}%">{html.escape(label)} {share:.1%}</div>'
        for label, share in ordered[:BARS]
    )
    return "".join(bars) + more


def _row(name: str, entry: Entry) -> list[str]:
    """An adapter in the table."""
    listed = entry.listed
    score = listed.test if listed.test is not None else listed.validation
    return [
        name,
        listed.status,
        listed.task or "-",
        listed.method or "-",
        Path(listed.base or "-").name,
        f"{listed.metric} {score:.4g}" if score is not None else "-",
        f"{listed.bytes / 1024:,.0f} KiB" if listed.bytes is not None else "-",
        f"{entry.date:%Y-%m-%d %H:%M}",
        listed.reason or "",
    ]


def _buttons(name: str) -> tuple[gr.Button, gr.Button]:
    with gr.Row():
        return gr.Button(name, variant="primary", scale=3), gr.Button("Stop", scale=1)


def _how_long(answer: Answer) -> str:
    """How long an answer is, and why it is not whole."""
    why = "cut by the model's limit" if answer.full else "cut" if answer.cut else "stopped" if answer.stopped else ""
    return ", ".join(filter(None, (counted(answer.tokens, "token"), why)))
