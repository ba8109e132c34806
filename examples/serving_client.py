"""Ask every model of a running server the same question: python examples/serving_client.py http://localhost:8000 TEXT

Start the server with: redpeft serve path/or/hub-name --adapters runs/teams -- --port 8000
It speaks the OpenAI API, so any OpenAI client works as well. A new adapter folder in runs/teams is served at once.
"""

import json
import sys
from urllib.request import Request, urlopen

server = sys.argv[1].rstrip("/")
question = sys.argv[2]


def call(path: str, body: dict | None = None) -> dict:
    """GET `path`, or POST `body` to it as JSON."""
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(server + path, data, {"Content-Type": "application/json"}), timeout=60) as reply:
        return json.load(reply)


for model in call("/v1/models")["data"]:  # the base model, and each adapter by the path of its folder
    answer = call("/v1/completions", {"model": model["id"], "prompt": question, "max_tokens": 64, "temperature": 0})
    print(f"{model['id']}: {answer['choices'][0]['text'].strip()}")
