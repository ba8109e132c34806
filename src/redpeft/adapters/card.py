"""The model card of an adapter folder: README.md with the front matter that the Hugging Face Hub reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from redpeft.adapters.folder import Adapter, read_adapter, read_config
from redpeft.console import counted
from redpeft.models import GGUF, SHORT_NAMES
from redpeft.storage import is_local

PAPER = "https://arxiv.org/abs/2402.15179"
AUTO_CLASS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def write_card(
    folder: str | Path,
    *,
    task: str | None = None,
    metrics: Mapping[str, float] | None = None,
    labels: Sequence[str] | None = None,
    recipe: Mapping[str, Any] | None = None,
    license: str | None = None,
) -> Path:
    """Write `folder`/README.md for the adapter in it, RED's or another PEFT method's; returns its path.

    `metrics`: numbers for the table of results; `labels`: a classifier's classes in order; `recipe`: the resolved
    recipe; `license`: only the author can give one. `UserError` as `read_adapter`.
    """
    config = read_config(folder)
    red = config["peft_type"] == "REDPEFT"
    base = config.get("base_model_name_or_path")
    local = base is None or _is_local(base)
    data = ModelCardData(
        # the Hub refuses a card whose base model is a local path
        base_model=None if local else base,
        library_name="peft",
        license=license,
        tags=[*(["redpeft"] if red else [config["peft_type"].lower()]), "peft", *([task] if task else [])],
        metrics=list(metrics) if metrics else None,
    )
    name = Path(base).name if base else "an unnamed base model"
    parts = [f"# {'RED' if red else config['peft_type']} adapter for {name}"]
    if red:
        parts += [_what_it_is(read_adapter(folder), name)]
    parts += [_how_to_load(config, None if local else base, Path(folder), labels, red)]
    if labels:
        parts += ["## Labels\n\n" + "\n".join(f"{index}. `{label}`" for index, label in enumerate(labels))]
    if metrics:
        rows = "\n".join(f"| {metric} | {value:.4g} |" for metric, value in metrics.items())
        parts += [f"## Results\n\n| metric | value |\n|---|---|\n{rows}"]
    if recipe:
        parts += [f"## Training recipe\n\n```yaml\n{yaml.safe_dump(dict(recipe), sort_keys=False)}```"]
    path = Path(folder) / "README.md"
    ModelCard("---\n" + data.to_yaml() + "\n---\n\n" + "\n\n".join(parts) + "\n").save(path)
    return path


def _is_local(base: str) -> bool:
    return base in SHORT_NAMES or is_local(base)


def write_folded_card(
    folder: Path, base: str, auto_class: str, changes: Mapping[str, Any], sites: int, left: Sequence[str]
) -> None:
    """Write `folder`/README.md for a folded checkpoint. `left`: the sites whose edits stayed in `folder`/adapter."""
    local = _is_local(base)
    name = Path(base).name
    data = ModelCardData(base_model=None if local else base, library_name="transformers", tags=["redpeft"])
    listed = ", ".join(f"`{key}: {value}`" for key, value in changes.items())
    changed = f" Its configuration got {listed}." if changes else ""
    parts = [
        f"# {name} with a RED adapter folded into it",
        f"The edits of {counted(sites, 'site')} (RED, [{PAPER.rpartition('/')[2]}]({PAPER})) are part of the "
        f"weights.{changed}",
    ]
    load = f'model = {auto_class}.from_pretrained("path/to/this/folder")'
    if left:
        where = f"a RED adapter in `adapter/` ({counted(len(left), 'site')})"
        parts += [f"What has no place in a plain checkpoint is {where}."]
        load = f"import redpeft  # registers RED with PEFT\nfrom peft import PeftModel\n\n{load}\n"
        load += 'model = PeftModel.from_pretrained(model, "path/to/this/folder/adapter")'
    parts += [f"```python\nfrom transformers import {auto_class}\n{load}\n```"]
    ModelCard("---\n" + data.to_yaml() + "\n---\n\n" + "\n\n".join(parts) + "\n").save(folder / "README.md")


def _what_it_is(adapter: Adapter, name: str) -> str:
    edit = sum(edit.scale.numel() + edit.bias.numel() for edit in adapter.edits.values())
    head = sum(tensor.numel() for tensor in adapter.head.values())
    widths = sorted({edit.scale.numel() for edit in adapter.edits.values()})
    sites = "\n".join(f"- `{site}`" for site in adapter.edits)
    return f"""RED (Representation EDiting, [{PAPER.rpartition("/")[2]}]({PAPER})) leaves {name} frozen
and edits its representations: at each site the output h becomes `scale * h + unit * bias`, with two learned vectors.

| | |
|---|---|
| sites | {len(adapter.edits)} ({adapter.config.get("sites") or "by target_modules"}) |
| width | {", ".join(map(str, widths))} |
| parameters of the edits | {edit:,} |
| parameters of the head | {head:,} |
| revision of the base model | {adapter.config.get("revision") or "not recorded"} |

<details><summary>All sites</summary>

{sites}

</details>"""


def _how_to_load(
    config: Mapping[str, Any], base: str | None, folder: Path, labels: Sequence[str] | None, red: bool
) -> str:
    auto = AUTO_CLASS.get(config.get("task_type") or "", "AutoModel")
    # a path on the author's disk is not for other eyes
    named, export = config.get("base_model_name_or_path") or "", ""
    if named in SHORT_NAMES or named.endswith(GGUF):
        base, export = "path/to/base", f"  # redpeft export-base {Path(named).name} --out path/to/base"
    name = f'"{base}"' if base else "PeftConfig.from_pretrained(folder).base_model_name_or_path"
    size = f", num_labels={len(labels)}" if labels else ""
    first = "import redpeft  # registers RED with PEFT\n" if red else ""
    install = "\n`pip install redpeft` first.\n" if red else ""
    return f"""## Use
{install}
```python
{first}from peft import {"PeftModel" if base else "PeftConfig, PeftModel"}
from transformers import {auto}

folder = "{"." if folder.is_absolute() else folder.as_posix()}"  # where this file lies
base = {auto}.from_pretrained({name}{size}){export}
model = PeftModel.from_pretrained(base, folder)
```"""
