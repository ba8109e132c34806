"""Units by hand: every kind of model without a batch, and the errors."""

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoModel,
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    CLIPConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    T5Config,
    TimesformerConfig,
    ViTConfig,
    Wav2Vec2Config,
    WhisperConfig,
)

from redpeft import RedConfig, RedLayer, calibrate
from redpeft.errors import UserError

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CONFIGS = {
    "bert": BertConfig(vocab_size=50, **SMALL),
    "roberta": RobertaConfig(vocab_size=50, max_position_embeddings=20, **SMALL),
    "t5": T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0),
    "vit": ViTConfig(image_size=32, patch_size=8, **SMALL),
    "clip-vision": CLIPVisionConfig(image_size=32, patch_size=8, **SMALL),
    "whisper": WhisperConfig(
        vocab_size=50, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_source_positions=30,
        max_target_positions=70, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=[], begin_suppress_tokens=[],
    ),
    "wav2vec2": Wav2Vec2Config(conv_dim=[8] * 7, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, **SMALL),
}  # fmt: skip


@pytest.mark.parametrize("family", CONFIGS)
def test_every_modality_without_a_batch(family):
    torch.manual_seed(0)
    model = get_peft_model(AutoModel.from_config(CONFIGS[family]), RedConfig())
    model.train()
    units = calibrate(model)
    sites = [module for module in model.modules() if isinstance(module, RedLayer)]
    assert len(units) == len(sites) == (4 if family in ("t5", "whisper") else 2)
    assert all(unit > 0 and unit != 1 for unit in units.values())
    assert model.training
    assert not any(layer.disable_adapters or layer._forward_hooks for layer in sites)
    assert calibrate(model) == units


def test_a_batch_of_your_own_and_never_twice():
    model = get_peft_model(AutoModel.from_config(CONFIGS["bert"]), RedConfig())
    batch = {"input_ids": torch.randint(0, 50, (3, 9))}
    units = calibrate(model, batch)
    assert calibrate(model, {"input_ids": torch.randint(0, 50, (3, 9))}) == units


def test_merged_and_disabled_adapters_are_measured_as_others():
    units = []
    for _ in range(2):
        torch.manual_seed(0)
        model = get_peft_model(AutoModel.from_config(CONFIGS["bert"]), RedConfig(init_weights=False))
        if not units:
            model.merge_adapter()
        with model.disable_adapter():
            units.append(calibrate(model))
        assert model.get_model_status().merged_adapters == []
    assert units[0] == units[1]


def test_nothing_to_calibrate_is_an_error():
    with pytest.raises(UserError, match="no RED adapter"):
        calibrate(AutoModel.from_config(CONFIGS["bert"]))


def test_inputs_that_cannot_be_guessed_are_an_error():
    model = get_peft_model(AutoModel.from_config(CONFIGS["bert"]), RedConfig())
    model.get_base_model().main_input_name = "pointcloud"
    with pytest.raises(UserError, match="cannot generate inputs for BertModel .it takes pointcloud.: pass a batch"):
        calibrate(model)


def test_a_site_that_the_batch_does_not_reach_is_an_error():
    model = get_peft_model(AutoModel.from_config(CONFIGS["bert"]), RedConfig())
    aside = RedLayer(torch.nn.Linear(4, 4), "default", RedConfig(), width=4, site="unreached")
    model.get_base_model().aside = aside
    with pytest.raises(UserError, match="does not reach 1 sites .unreached"):
        calibrate(model)


VIDEO = TimesformerConfig(image_size=32, patch_size=8, num_frames=2, **SMALL)
CLIP = CLIPConfig(
    text_config={"vocab_size": 50, "max_position_embeddings": 20, **SMALL},
    vision_config={"image_size": 32, "patch_size": 8, **SMALL},
    projection_dim=8,
)


@pytest.mark.parametrize(
    ("config", "batch"),
    [
        (VIDEO, {"pixel_values": (2, 2, 3, 32, 32)}),
        (CLIP, {"input_ids": (2, 6), "pixel_values": (2, 3, 32, 32)}),
    ],
    ids=["video", "clip"],
)
def test_models_whose_inputs_cannot_be_made_up_measure_on_the_first_batch(config, batch):
    torch.manual_seed(0)
    inputs = {
        name: torch.randint(3, 50, shape) if name == "input_ids" else torch.randn(shape)
        for name, shape in batch.items()
    }
    model = get_peft_model(AutoModel.from_config(config), RedConfig()).train()
    with pytest.raises(UserError, match=f"cannot generate inputs for {type(model.get_base_model()).__name__} "):
        calibrate(model)
    model(**inputs)
    assert all(unit not in (0, 1) for unit in calibrate(model).values())


def test_heads_and_special_tokens_do_not_stand_in_the_way():
    """Classifiers refuse batches without padding tokens, or count the ends of rows."""
    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    bart = BartForSequenceClassification(BartConfig(vocab_size=50, **small, **heads))
    llama = LlamaForSequenceClassification(LlamaConfig(vocab_size=50, **SMALL))
    for base in (bart, llama):
        model = get_peft_model(base, RedConfig(task_type="SEQ_CLS"))
        assert all(unit not in (0, 1) for unit in calibrate(model).values())


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
@pytest.mark.parametrize("batch", [None, {"input_ids": torch.arange(6)[None]}], ids=["made up", "batch"])
def test_wrapped_models(wrap, batch):
    torch.manual_seed(0)
    base = AutoModel.from_config(CONFIGS["bert"])
    plain = get_peft_model(copy.deepcopy(base), RedConfig())
    assert calibrate(wrap(get_peft_model(base, RedConfig())), batch) == calibrate(plain, batch)
