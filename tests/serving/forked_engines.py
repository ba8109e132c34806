"""Engines with RED adapters only, each in a process forked from one that has imported vLLM: for `test_families`.

    python forked_engines.py '[{"base": FOLDER, "prompts": [[1, 5]], "requests": [ADAPTER or null], "out": FILE}]'

This takes a fifth of the time that engines with processes of their own take to start.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_KVCACHE_SPACE": "1"}
sys.path.insert(0, str(Path(__file__).parents[1]))

import vllm  # noqa: F401  # once for all

from serving.test_engine import RED_ONLY, answers, engine, named


def answer(job: dict) -> list[list[int]]:
    adapters = sorted({request for request in job["requests"] if request})
    llm = engine(job["base"], additional_config=RED_ONLY)
    requests = [each and named(Path(each).name, 1 + adapters.index(each), each) for each in job["requests"]]
    return answers(llm, job["prompts"], requests)


def main() -> None:
    for job in json.loads(sys.argv[1]):
        process = os.fork()
        if process == 0:
            try:
                Path(job["out"]).write_text(json.dumps(answer(job)))
            except Exception:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(0)  # nothing of the parent's is to be tidied here
        os.waitpid(process, 0)


if __name__ == "__main__":
    main()
