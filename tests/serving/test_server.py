"""`redpeft serve` on a folder, called by OpenAI's client."""

from __future__ import annotations

import json
import shutil
import threading
import urllib.error

import pytest
from safetensors.torch import save_file
from transformers import AutoTokenizer

from .server import Server, put
from .tiny_adapters import adapter, edits

pytestmark = pytest.mark.serving


@pytest.fixture(scope="module")
def server(base, adapters, tmp_path_factory):
    root = tmp_path_factory.mktemp("server")
    for number in range(6):
        shutil.copytree(adapters[number], root / "served" / f"edit-{number}")
    adapter(root / "served" / ".trash" / "x", 20)
    adapter(root / "served" / "half.partial", 20)
    adapter(root / "served" / "of-gpt2", 20, ["transformer.h.0.mlp.c_proj"])
    adapter(root / "served" / "of-queries", 20, ["model.layers.0.self_attn.q_proj"])
    adapter(root / "served" / "damaged", 20)
    tensors = edits(20)
    next(iter(tensors.values()))[3] = float("nan")
    save_file(tensors, root / "served" / "damaged" / "adapter_model.safetensors")
    adapter(root / "outside", 21)
    made = Server(base, root / "served", root / "log")
    yield made.wait()
    made.stop()


def test_every_adapter_is_a_model(server):
    """Those too that will be refused; the server starts without them."""
    assert server.models() == ["base", "damaged", *(f"edit-{number}" for number in range(6)), "of-gpt2", "of-queries"]


def test_concurrent_requests_answer_as_transformers(server, adapters, prompts, reference):
    names = ["base", *(f"edit-{number}" for number in range(6))] * 2  # more adapters than the three slots
    found: dict[int, list[int]] = {}

    def ask(index: int) -> None:
        found[index] = server.ask(names[index], prompts[index % len(prompts)])

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    folders = [None if name == "base" else adapters[int(name[-1])] for name in names]
    order = range(len(names))
    reference.check([found[i] for i in order], [prompts[i % len(prompts)] for i in order], folders)


def refused(server, name: str) -> Exception:
    from openai import APIStatusError

    with pytest.raises(APIStatusError) as caught:
        server.ask(name, [1, 5, 6])
    return caught.value


def test_a_damaged_adapter_is_refused_and_the_others_serve_on(server, adapters, prompts, reference):
    for _ in range(3):
        error = refused(server, "damaged")
        assert error.status_code == 400
        assert "The adapter `damaged` cannot be served: " in error.message
        assert "model.layers.0.mlp.down_proj: scale has values that are not finite" in error.message
    log = server.log.read_text()
    assert log.count("scale has values that are not finite") == 1
    assert "Traceback" not in log
    reference.check([server.ask("edit-0", prompts[0])], [prompts[0]], [adapters[0]])


NO_NAMES = """../outside edit-0/../../outside {}/outside edit-99 .trash/x half.partial edit-0/ edit-0// ./edit-0
    edit-0/. of-gpt2/../edit-0 EDIT-0"""
ODD_NAMES = [" edit-0", "edit-0\0", "x" * 5000, "edit-0/" * 1000]


def test_other_names_than_those_of_the_list_are_unknown(server):
    before = server.models()
    for name in [*NO_NAMES.split(), *ODD_NAMES]:
        assert refused(server, name.format(server.folder.parent)).status_code == 404, name
    with pytest.raises(urllib.error.HTTPError, match="400"):
        server.post("v1/completions", model="\ud800", prompt=[1, 5, 6])
    assert server.models() == before
    assert server.get("health") == ""


def test_links_out_of_the_folder_and_absurd_numbers_are_refused(server):
    adapter(server.folder / "linked", 1)
    weights = server.folder / "linked" / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(server.folder.parent / "outside" / "adapter_model.safetensors")
    assert "this link leads out of" in refused(server, "linked").message
    adapter(server.folder / "absurd", 1)
    tensors = edits(1)
    next(iter(tensors.values()))[3] = 1e30
    save_file(tensors, server.folder / "absurd" / "adapter_model.safetensors")
    error = refused(server, "absurd")
    assert error.status_code == 400
    assert "the scale of model.layers.0.mlp.down_proj goes up to 1e+30, and no more than 1,000,000" in error.message


def test_loading_and_unloading_by_hand(server, adapters, prompts, reference):
    def post(door, **body):
        try:
            return 200, server.post(f"v1/{door}_lora_adapter", **body)
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    for name in ("damaged", "nobody"):
        assert post("load", lora_name=name, lora_path=str(server.folder / name))[0] == 400
    path = str(server.folder / "edit-5")
    assert post("load", lora_name="second", lora_path=path)[0] == 400
    post("unload", lora_name="edit-5")
    assert "'edit-5' added successfully" in post("load", lora_name="edit-5", lora_path=path)[1]
    code, said = post("unload", lora_name="edit-5")
    assert code == 200
    assert "since it is still in the folder" in said
    reference.check([server.ask("edit-5", prompts[0])], [prompts[0]], [adapters[5]])
    assert post("unload", lora_name="nobody")[0] == 404


def test_no_request_loads_from_outside_the_folder(server):
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.post("v1/load_lora_adapter", lora_name="outside", lora_path=str(server.folder.parent / "outside"))
    assert "not served, since it is not below" in caught.value.read().decode()
    assert "outside" not in server.models()


def test_new_ones_are_picked_up_replaced_ones_answer_anew_and_removed_ones_are_gone(
    server, adapters, prompts, reference
):
    prompt = prompts[2] * 2  # blocks of the prefix cache
    shutil.copytree(adapters[7], server.folder / "later")
    assert "later" in server.models()
    for _ in range(2):
        reference.check([server.ask("later", prompt)], [prompt], [adapters[7]])
    put(adapters[8], server.folder / "later")
    for _ in range(2):
        reference.check([server.ask("later", prompt)], [prompt], [adapters[8]])
    shutil.rmtree(server.folder / "later")
    assert refused(server, "later").status_code == 404
    assert "later" not in server.models()


def test_a_chat_is_written_by_the_template_of_its_adapter(server, adapters, base):
    shutil.copytree(adapters[0], server.folder / "templated")
    (server.folder / "templated" / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    chat = [{"role": "user", "content": "Hi"}]
    tokenizer = AutoTokenizer.from_pretrained(base)
    for name, text in {
        "templated": "Hi!",
        "edit-0": tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
    }.items():
        asked = json.loads(server.post("tokenize", model=name, messages=chat, add_special_tokens=False))["tokens"]
        assert tokenizer.decode(asked) == text
        answer = server.client.chat.completions.create(model=name, messages=chat, max_tokens=2)
        assert answer.usage.prompt_tokens == len(asked)
    shutil.rmtree(server.folder / "templated")


def test_a_cancelled_request_leaves_the_rest_in_order(server, adapters, prompts, reference):
    stream = server.client.completions.create(
        model="edit-1", prompt=prompts[0], max_tokens=90, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    for number in (1, 2):
        reference.check([server.ask(f"edit-{number}", prompts[1])], [prompts[1]], [adapters[number]])


def test_sites_that_the_server_has_no_table_for_are_named(server):
    adapter(server.folder / "attention", 30, ["model.layers.0.self_attn.o_proj"])
    error = refused(server, "attention")
    assert error.status_code == 400
    assert "it edits model.layers.0.self_attn.o_proj, and this server has tables for" in error.message
    assert "start it again, or fold" in error.message
    assert "has no module transformer.h.0.mlp.c_proj" in refused(server, "of-gpt2").message
    assert "has no module model.layers.0.self_attn.q_proj to edit" in refused(server, "of-queries").message


def test_an_adapter_of_another_base_model_is_refused(server, other_fingerprint):
    adapter(server.folder / "foreign", 31, base_fingerprint=other_fingerprint)
    assert refused(server, "foreign").status_code == 400
    assert f"is for another base model than {server.base}: the weights differ" in server.log.read_text()


def test_a_prompt_that_is_too_long_is_the_callers_error(server, prompts, reference, adapters):
    """Longer than --max-model-len, alone or with the answer: a line for the caller, and no error of the server."""
    import openai

    client = server.client
    for name in ("base", "edit-1"):
        for tokens in (128, 200, 5000):
            with pytest.raises(openai.BadRequestError, match="Error code: 400 - .*max"):
                client.completions.create(model=name, prompt=[5] * tokens, max_tokens=5)
        found = client.completions.create(model=name, prompt=[5] * 120, max_tokens=50)
        assert found.usage.completion_tokens <= 8  # what there is room for
        with pytest.raises(openai.BadRequestError, match="Error code: 400 - .*maximum context length"):
            client.chat.completions.create(model=name, messages=[{"role": "user", "content": "x" * 500}])
    assert server.ask("edit-1", prompts[0]) == reference.answer(prompts[0], adapters[1])
