"""Tiny models, tokenizers and data that every room's tests share. Everything is random and made on the spot."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of small public data sets beside the repository; the test is skipped where there is none."""
    folder = Path(__file__).parents[1] / ".." / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the repository")
    return folder.resolve()


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A BERT-like WordPiece tokenizer: some whole words, every other word is cut into single letters."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = ["the", "is", "good", "bad", "great", "awful", "film", "shop", "not", "very", "in"]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *".,!?'", *letters, *(f"##{x}" for x in letters)]
    ids = {piece: index for index, piece in enumerate(vocab)}
    backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture(scope="session")
def tiny_encoder_folder(tiny_tokenizer, tmp_path_factory) -> Path:
    """A saved BertModel (hidden 32, 2 layers, random weights) with its tokenizer. Do not write into it."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny_encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    BertModel(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def still_encoder(tiny_encoder_folder, tiny_tokenizer, tmp_path_factory):
    """The tiny encoder without dropout, so that a run is the same whatever is drawn beside it."""
    from transformers import AutoModel

    folder = tmp_path_factory.mktemp("still_encoder")
    model = AutoModel.from_pretrained(tiny_encoder_folder)
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def _byte_tokenizer(chat_template: str | None):
    """A Llama-like tokenizer of single bytes (exact round trip): adds <s>, has no pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    ids = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=ids, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", ids["<s>"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=256,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="session")
def tiny_chat_tokenizer():
    """The tokenizer of `tiny_decoder_folder` with a chat template that marks what the assistant says."""
    return _byte_tokenizer(CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def tiny_decoder_folder(tmp_path_factory) -> Path:
    """A saved LlamaForCausalLM (hidden 32, 2 layers, random weights); tokenizer without pad token or chat template.

    Do not write into it.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_decoder")
    tokenizer = _byte_tokenizer(None)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def e2e_rows(names) -> list[dict[str, str]]:
    """Meaning representations as in the E2E challenge, with two texts each, in the columns of the public files."""
    return [
        {"mr": f"name[{name}], food[{food}], area[{area}]", "ref": text.format(name, food, area)}
        for name in names
        for food in ("Thai", "English")
        for area in ("riverside", "city centre")
        for text in ("{} serves {} food in the {} area.", "There is a place called {0} in the {2}, with {1} food.")
    ]


@pytest.fixture(scope="session")
def e2e_folder(tmp_path_factory) -> Path:
    """trainset.csv (24 rows), devset.csv (8 rows, 4 MRs) and testset_w_refs.csv (8 rows, 4 MRs)."""
    folder = tmp_path_factory.mktemp("e2e")
    files = {"trainset": ["The Mill", "Blue Spice", "Aromi"], "devset": ["Zizzi"], "testset_w_refs": ["Cotto"]}
    for name, names in files.items():
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["mr", "ref"])
            writer.writeheader()
            writer.writerows(e2e_rows(names))
    return folder


@pytest.fixture(scope="session")
def tiny_gpt2_folder(tmp_path_factory) -> Path:
    """A saved GPT2LMHeadModel (hidden 32, 2 layers, random weights). As the real one's, its tokenizer knows one
    special token, which begins, ends and is unknown, and has none to pad with. Do not write into it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder, end = tmp_path_factory.mktemp("tiny_gpt2"), "<|endoftext|>"
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[end],
        show_progress=False,
    )
    texts = [text for row in e2e_rows(["The Mill", "Blue Spice", "Aromi", "Zizzi", "Cotto"]) for text in row.values()]
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=end, bos_token=end, eos_token=end, model_max_length=256
    )
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=256,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_t5_folder(tmp_path_factory) -> Path:
    """A saved T5ForConditionalGeneration (hidden 32, 2 + 2 layers, random weights); its tokenizer cuts texts into
    single characters and puts </s> behind each text. Do not write into it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("tiny_t5")
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:?!'-_\u2581"
    ids = {piece: index for index, piece in enumerate(["<pad>", "</s>", "<unk>", *letters])}
    backend = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", ids["</s>"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=128,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=ids["<pad>"],
        pad_token_id=ids["<pad>"],
        eos_token_id=ids["</s>"],
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
