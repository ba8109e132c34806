"""Tiny models, tokenizers and data that tests of every package share. Do not write into their folders."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from helpers.data import e2e_rows, write_rows

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs without it


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of small public data sets beside the repository; the test is skipped where there is none."""
    folder = Path(__file__).parents[1] / ".." / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the repository")
    return folder.resolve()


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """The tokenizer of `tiny_encoder_folder`."""
    from helpers.models import word_tokenizer

    return word_tokenizer()


@pytest.fixture(scope="session")
def tiny_encoder_folder(tiny_tokenizer, tmp_path_factory) -> Path:
    """A saved BertModel."""
    from helpers.models import bert, save

    return save(tmp_path_factory.mktemp("tiny_encoder"), bert(tiny_tokenizer), tiny_tokenizer)


@pytest.fixture(scope="session")
def still_encoder(tiny_tokenizer, tmp_path_factory) -> Path:
    """The tiny encoder without dropout, so that a run is the same whatever is drawn beside it."""
    from helpers.models import bert, save

    model = bert(tiny_tokenizer, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return save(tmp_path_factory.mktemp("still_encoder"), model, tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_chat_tokenizer():
    """The tokenizer of `tiny_decoder_folder` with a chat template that marks what the assistant says."""
    from helpers.models import CHAT_TEMPLATE, byte_tokenizer

    return byte_tokenizer(CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def tiny_decoder_folder(tmp_path_factory) -> Path:
    """A saved LlamaForCausalLM; its tokenizer has no pad token and no chat template."""
    from helpers.models import byte_tokenizer, llama, save

    tokenizer = byte_tokenizer()
    return save(tmp_path_factory.mktemp("tiny_decoder"), llama(tokenizer), tokenizer)


@pytest.fixture(scope="session")
def tiny_gpt2_folder(tmp_path_factory) -> Path:
    """A saved GPT2LMHeadModel."""
    from helpers.models import gpt2, gpt2_tokenizer, save

    rows = e2e_rows(["The Mill", "Blue Spice", "Aromi", "Zizzi", "Cotto"])
    tokenizer = gpt2_tokenizer(text for row in rows for text in row.values())
    return save(tmp_path_factory.mktemp("tiny_gpt2"), gpt2(tokenizer), tokenizer)


@pytest.fixture(scope="session")
def tiny_t5_folder(tmp_path_factory) -> Path:
    """A saved T5ForConditionalGeneration."""
    from helpers.models import letter_tokenizer, save, t5

    tokenizer = letter_tokenizer()
    return save(tmp_path_factory.mktemp("tiny_t5"), t5(tokenizer), tokenizer)


@pytest.fixture(scope="session")
def e2e_folder(tmp_path_factory) -> Path:
    """trainset.csv (24 rows), devset.csv (8 rows, 4 MRs) and testset_w_refs.csv (8 rows, 4 MRs)."""
    folder = tmp_path_factory.mktemp("e2e")
    files = {"trainset": ["The Mill", "Blue Spice", "Aromi"], "devset": ["Zizzi"], "testset_w_refs": ["Cotto"]}
    for name, names in files.items():
        write_rows(folder / f"{name}.csv", e2e_rows(names))
    return folder
