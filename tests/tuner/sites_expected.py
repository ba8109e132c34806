"""What `find_sites` must answer, written by hand from the source of each model in transformers 5.23.

A pattern stands for one site per block: `{4}` counts from 0 to 3. Models are built from their default configurations,
cut to four blocks (`test_sites.build`), with the changes of `CHANGES`.
"""

READ_FROM = "5.23"  # attribute names change between releases

RESNET = {"use_timm_backbone": False, "backbone": None, "backbone_config": {"model_type": "resnet"}}
STAGES = {"model_type": "resnet", "out_features": ["stage2", "stage3", "stage4"]}

# Changes to a family's default configuration: to build it at all, or to see more of it than the default shows.
CHANGES = {
    "autoformer": {"prediction_length": 4},
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16}},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "conditional_detr": RESNET,
    "dab-detr": RESNET,
    "dbrx": {"attn_config": {"kv_n_heads": 8, "rope_theta": 1e4}},
    "deformable_detr": RESNET | {"backbone_config": STAGES},
    "detr": RESNET,
    "doge": {"is_moe": True},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1},
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "funnel": {"architectures": ["FunnelModel"], "block_sizes": [2, 2], "num_decoder_layers": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "granitemoe_swa": {"shared_intermediate_size": 1024},
    "granitemoeshared": {"shared_intermediate_size": 1024},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "hunyuan_vl_text": {"head_dim": 128},
    "informer": {"prediction_length": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "ministral": {"head_dim": 128},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "swin": {"depths": [2, 2], "num_heads": [3, 6]},
    "switch_transformers": {"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2},
    "table-transformer": RESNET,
    "time_series_transformer": {"prediction_length": 4},
    "zamba": {"num_hidden_layers": 12, "layers_block_type": ["mamba", "mamba", "hybrid", "mamba"] * 3},
    "zamba2": {"num_hidden_layers": 12, "layers_block_type": ["mamba", "mamba", "hybrid"] * 4},
}

# Families whose default configuration makes no model, or needs a package that is not installed here.
NOT_BUILT = {
    "needs timm": """edgetam edgetam_vision_model fast_vlm gemma3n gemma3n_vision omdet-turbo pe_audio_video
        pe_audio_video_encoder pe_video pe_video_encoder perception_lm timm_backbone timm_wrapper""",
    "needs natten, detectron2 or torchaudio": "dinat layoutlmv2 higgs_audio_v2_tokenizer",
    "its default configuration is not a model": """cohere_compass cohere_compass_text deepseek_ocr2 diffusion_gemma
        granite4_vision musicgen musicgen_melody pp_ocrv6_medium_det qwen4_exp qwen4_exp_text t5gemma2_encoder
        voxtral_realtime_text""",
}

# Families in which nothing is the output of an FFN made of linears, or nothing tells which of two is.
NO_FFN = {
    "state-space blocks alone": "mamba mamba2 falcon_mamba",
    "the last linear's output is multiplied by another's": "rwkv",
    "convolutions in the place of linears": """bit dac efficientnet encodec fastspeech2_conformer
        fastspeech2_conformer_with_hifigan glm_image_vqmodel hgnet_v2 mobilenet_v1 mobilenet_v2 mobilevitv2 poolformer
        pp_ocrv5_mobile_rec pp_ocrv5_server_rec pp_ocrv6_small_det pp_ocrv6_small_rec pp_ocrv6_tiny_rec regnet resnet
        squeezebert swiftformer textnet univnet uvdoc vits wavtokenizer_encoder""",
    "the MLP reads more than the block's width": "efficientloftr lightglue",
    "two FFNs that look alike, one for each kind of input": "higgs_audio_v2 lxmert",
    "the experts are added behind one more attention than the FFN beside them": "longcat_flash",
    "gone since transformers 5": "jukebox mega van",
    "two halves of an FFN declared without attention between them": "gemma4_audio",
}

# Families with blocks of which some have no FFN: attention alone, a state-space mixer alone, convolutions.
MIXED = "levit nemo_speechlm nemotron_h sam3_lite_text sam3_lite_text_text_model zamba zamba2"

# Families with modules of one class of which some hold a site and others none, because
TWINS = " ".join(
    (
        # a block has half an FFN before its attention and half an FFN, which is edited, after it;
        "canary cohere_asr gemma3n_audio granite_speech5_ctc granite_speech5_encoder lasr_ctc lasr_encoder",
        "nemotron3_5_asr nemotron_asr_streaming nemotron_asr_streaming_encoder neucodec parakeet_ctc parakeet_encoder",
        "parakeet_rnnt parakeet_tdt seamless_m4t seamless_m4t_v2 wav2vec2-bert wav2vec2-conformer xcodec2",
        # a smaller FFN works on something else than the block's stream;
        "edgetam_video lilt patchtsmixer",
        # a prediction head is of the same class;
        "sam2 sam2_video sam3_tracker sam3_tracker_video",
        # a layer stands outside the repeated blocks;
        "perceiver",
        # the class is that of all linears.
        "gemma4_vision",
    )
)

BERT = ["encoder.layer.{4}.output.dense"]
BART = ["encoder.layers.{4}.fc2", "decoder.layers.{4}.fc2"]
T5 = ["encoder.block.{4}.layer.1.DenseReluDense.wo", "decoder.block.{4}.layer.2.DenseReluDense.wo"]
LLAMA = ["layers.{4}.mlp.down_proj"]
MIXTRAL = ["layers.{4}.mlp"]
WAV2VEC2 = ["encoder.layers.{4}.feed_forward.output_dense"]
LLAVA = ["language_model.layers.{4}.mlp.down_proj"]

FFN = {
    # encoders of text
    "albert": ["encoder.albert_layer_groups.0.albert_layers.0.ffn_output"],
    "bert": BERT,
    "big_bird": BERT,
    "camembert": BERT,
    "canine": [
        "initial_char_encoder.layer.0.output.dense",
        "encoder.layer.{4}.output.dense",
        "final_char_encoder.layer.0.output.dense",
    ],
    "convbert": BERT,
    "cpmant": ["encoder.layers.{4}.ffn.ffn.w_out"],
    "data2vec-text": BERT,
    "deberta": BERT,
    "deberta-v2": BERT,
    "distilbert": ["transformer.layer.{4}.ffn.lin2"],
    "electra": BERT,
    "ernie": BERT,
    "esm": BERT,
    "flaubert": ["ffns.{4}.lin2"],
    "fnet": BERT,
    "funnel": ["encoder.blocks.{2}.{2}.ffn.linear_2", "decoder.layers.{2}.ffn.linear_2"],
    "ibert": BERT,
    "layoutlm": BERT,
    "layoutlmv3": BERT,
    "lilt": BERT,
    "longformer": BERT,
    "luke": BERT,
    "megatron-bert": BERT,
    "mobilebert": BERT,  # not the bottleneck's way back to the wide stream, nor the smaller FFNs before
    "modernbert": ["layers.{4}.mlp.Wo"],
    "mpnet": BERT,
    "nystromformer": BERT,
    "reformer": ["encoder.layers.{4}.feed_forward.output.dense"],
    "rembert": BERT,
    "roberta": BERT,
    "roformer": BERT,
    "splinter": BERT,
    "tapas": BERT,
    "xlm": ["ffns.{4}.lin2"],
    "xlm-roberta": BERT,
    "xlnet": ["layer.{4}.ff.layer_2"],
    "xmod": BERT,  # not the adapters of its languages
    "yoso": BERT,
    # decoders of text
    "biogpt": ["layers.{4}.fc2"],
    "bitnet": LLAMA,
    "bloom": ["h.{2}.mlp.dense_4h_to_h"],
    "codegen": ["h.{4}.mlp.fc_out"],
    "cohere": LLAMA,
    "ctrl": ["h.{4}.ffn.2"],
    "exaone4": LLAMA,
    "falcon": ["h.{4}.mlp.dense_4h_to_h"],
    "gemma": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "gemma3n_text": ["layers.{4}.mlp.down_proj"],  # not the low-rank ways beside it
    "glm": LLAMA,
    "gpt2": ["h.{4}.mlp.c_proj"],
    "gpt_bigcode": ["h.{4}.mlp.c_proj"],
    "gpt_neo": ["h.{4}.mlp.c_proj"],
    "gpt_neox": ["layers.{4}.mlp.dense_4h_to_h"],
    "gptj": ["h.{4}.mlp.fc_out"],
    "granite": LLAMA,
    "lfm2": ["layers.{4}.feed_forward.w2"],
    "llama": LLAMA,
    "mistral": LLAMA,
    "mpt": ["blocks.{4}.ffn.down_proj"],
    "nemotron": LLAMA,
    "olmo": LLAMA,
    "olmo2": LLAMA,
    "opt": ["decoder.layers.{4}.fc2"],
    "persimmon": ["layers.{4}.mlp.dense_4h_to_h"],
    "phi": ["layers.{4}.mlp.fc2"],
    "phi3": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "recurrent_gemma": ["layers.{4}.mlp_block.down_proj"],
    "smollm3": LLAMA,
    "stablelm": LLAMA,
    "starcoder2": ["layers.{4}.mlp.c_proj"],
    "xglm": ["layers.{4}.fc2"],
    # mixtures of experts, some of whose blocks are dense
    "dbrx": ["blocks.{4}.ffn"],
    "deepseek_v2": MIXTRAL,
    "deepseek_v3": ["layers.{3}.mlp.down_proj", "layers.3.mlp"],
    "ernie4_5_vl_moe": [
        "language_model.layers.0.mlp.down_proj",
        *(f"language_model.layers.{i}.mlp" for i in (1, 2, 3)),
    ],
    "gpt_oss": MIXTRAL,
    "granitemoe": ["layers.{4}.block_sparse_moe"],
    "hunyuan_v1_moe": MIXTRAL,
    "jamba": [f"layers.{i}.feed_forward{'' if i % 2 else '.down_proj'}" for i in range(4)],
    "jetmoe": MIXTRAL,
    "lfm2_moe": ["layers.{2}.feed_forward.w2", "layers.2.feed_forward", "layers.3.feed_forward"],
    "llama4": ["language_model.model.layers.{4}.feed_forward"],
    "llama4_text": [f"layers.{i}.feed_forward{'' if i % 2 else '.down_proj'}" for i in range(4)],
    "mixtral": MIXTRAL,
    "nemotron_h": ["layers.1.mixer", "layers.3.mixer.down_proj"],  # mamba, experts, attention, MLP
    "olmoe": MIXTRAL,
    "phimoe": MIXTRAL,
    "qwen2_moe": MIXTRAL,
    "qwen3_moe": MIXTRAL,
    "qwen3_next": MIXTRAL,
    "switch_transformers": [
        f"{side}.block.{i}.layer.{part}.mlp{'' if i % 2 else '.wo'}"
        for side, part in (("encoder", 1), ("decoder", 2))
        for i in range(4)
    ],
    "zamba2": [f"layers.{i}.shared_transformer.feed_forward.down_proj" for i in (2, 5, 8, 11)],
    # encoder-decoders
    "bart": BART,
    "bigbird_pegasus": BART,
    "blenderbot": ["encoder.layers.{2}.fc2", "decoder.layers.{4}.fc2"],
    "blenderbot-small": BART,
    "led": BART,
    "longt5": T5,
    "m2m_100": BART,
    "marian": BART,
    "mbart": BART,
    "mt5": T5,
    "mvp": BART,
    "pegasus": BART,
    "plbart": BART,
    "prophetnet": ["encoder.layers.{4}.feed_forward.output", "decoder.layers.{4}.feed_forward.output"],
    "t5": T5,
    "t5gemma": ["encoder.layers.{4}.mlp.down_proj", "decoder.layers.{4}.mlp.down_proj"],
    "udop": T5,
    "umt5": T5,
    # vision
    "beit": ["layers.{4}.mlp.fc2"],
    "clip_vision_model": ["encoder.layers.{4}.mlp.fc2"],
    "deit": ["layers.{4}.mlp.fc2"],
    "dinov2": ["encoder.layer.{4}.mlp.fc2"],
    "glpn": ["encoder.block.{4}.{2}.mlp.dense2"],
    "mgp-str": ["mgp_str.encoder.blocks.{4}.mlp.fc2"],
    "siglip_vision_model": ["encoder.layers.{4}.mlp.fc2"],
    "swin": ["encoder.layers.{2}.blocks.{2}.mlp.fc2"],
    "timesformer": BERT,
    "vit": ["layers.{4}.mlp.fc2"],
    # speech
    "hubert": WAV2VEC2,
    "speecht5": [
        "encoder.wrapped_encoder.layers.{4}.feed_forward.output_dense",
        "decoder.wrapped_decoder.layers.{4}.feed_forward.output_dense",
    ],
    "wav2vec2": WAV2VEC2,
    "wav2vec2-bert": ["encoder.layers.{4}.ffn2.output_dense"],  # the second of the two halves
    "wav2vec2-conformer": ["encoder.layers.{4}.ffn2.output_dense"],
    "wavlm": WAV2VEC2,
    "whisper": BART,
    # several towers: the one that reads text
    "blip-2": ["language_model.model.decoder.layers.{4}.fc2"],
    "clip": ["text_model.encoder.layers.{4}.mlp.fc2"],
    "flava": ["text_model.encoder.layer.{4}.output.dense"],
    "gemma3": LLAVA,
    "git": BERT,
    "idefics3": ["text_model.layers.{4}.mlp.down_proj"],
    "instructblip": ["language_model.decoder.layers.{4}.fc2"],
    "llava": LLAVA,
    "paligemma": LLAVA,
    "phi4_multimodal": LLAMA,
    "qwen2_5_vl": LLAVA,
    "qwen2_audio": LLAVA,
    "siglip": ["text_model.encoder.layers.{4}.mlp.fc2"],
    "vision-text-dual-encoder": ["text_model.encoder.layer.{4}.output.dense"],
}

BERT_ATTENTION = ["encoder.layer.{4}.attention.output.dense"]
BERT_QKV = [f"encoder.layer.{{4}}.attention.self.{name}" for name in ("query", "key", "value")]
LLAMA_QKV = [f"layers.{{4}}.self_attn.{name}_proj" for name in "qkv"]
BART_QKV = [f"{side}.layers.{{4}}.self_attn.{name}_proj" for side in ("encoder", "decoder") for name in "qkv"]

ATTENTION = {
    "albert": ["encoder.albert_layer_groups.0.albert_layers.0.attention.dense"],
    "bart": ["encoder.layers.{4}.self_attn.out_proj", "decoder.layers.{4}.self_attn.out_proj"],
    "bert": BERT_ATTENTION,
    "bloom": ["h.{2}.self_attention.dense"],
    "deberta": BERT_ATTENTION,
    "deberta-v2": BERT_ATTENTION,
    "deepseek_v3": ["layers.{4}.self_attn.o_proj"],
    "distilbert": ["transformer.layer.{4}.attention.out_lin"],
    "falcon": ["h.{4}.self_attention.dense"],
    "gpt2": ["h.{4}.attn.c_proj"],
    "gpt_neox": ["layers.{4}.attention.dense"],
    "gptj": ["h.{4}.attn.out_proj"],
    "jamba": [f"layers.{i}.self_attn.o_proj" for i in (1, 3)],
    "llama": ["layers.{4}.self_attn.o_proj"],
    "mobilebert": BERT_ATTENTION,
    "modernbert": ["layers.{4}.attn.Wo"],
    "mpnet": ["encoder.layer.{4}.attention.attn.o"],
    "phi3": ["layers.{4}.self_attn.o_proj"],
    "roberta": BERT_ATTENTION,
    "swin": ["encoder.layers.{2}.blocks.{2}.attention.o_proj"],
    "t5": ["encoder.block.{4}.layer.0.SelfAttention.o", "decoder.block.{4}.layer.0.SelfAttention.o"],
    "vit": ["layers.{4}.attention.o_proj"],
    "wav2vec2": ["encoder.layers.{4}.attention.out_proj"],
    "wav2vec2-conformer": ["encoder.layers.{4}.self_attn.linear_out"],
    "whisper": ["encoder.layers.{4}.self_attn.out_proj", "decoder.layers.{4}.self_attn.out_proj"],
    "xlm": ["attentions.{4}.out_lin"],
}

QKV = {
    "albert": [f"encoder.albert_layer_groups.0.albert_layers.0.attention.{n}" for n in ("query", "key", "value")],
    "bart": BART_QKV,
    "bert": BERT_QKV,
    "bloom": ["h.{2}.self_attention.query_key_value"],
    "deberta": ["encoder.layer.{4}.attention.self.in_proj"],
    "deberta-v2": [f"encoder.layer.{{4}}.attention.self.{name}_proj" for name in ("query", "key", "value")],
    "distilbert": [f"transformer.layer.{{4}}.attention.{name}_lin" for name in "qkv"],
    "falcon": ["h.{4}.self_attention.query_key_value"],
    "gpt2": ["h.{4}.attn.c_attn"],
    "gpt_neox": ["layers.{4}.attention.query_key_value"],
    "gptj": [f"h.{{4}}.attn.{name}_proj" for name in "qkv"],
    "jamba": [f"layers.{i}.self_attn.{name}_proj" for i in (1, 3) for name in "qkv"],
    "llama": LLAMA_QKV,
    "mistral": LLAMA_QKV,
    "modernbert": ["layers.{4}.attn.Wqkv"],
    "mpnet": [f"encoder.layer.{{4}}.attention.attn.{name}" for name in "qkv"],
    "phi3": ["layers.{4}.self_attn.qkv_proj"],
    "roberta": BERT_QKV,
    "swin": [f"encoder.layers.{{2}}.blocks.{{2}}.attention.{name}_proj" for name in "qkv"],
    "t5": [f"{side}.block.{{4}}.layer.0.SelfAttention.{name}" for side in ("encoder", "decoder") for name in "qkv"],
    "vit": [f"layers.{{4}}.attention.{name}_proj" for name in "qkv"],
    "wav2vec2": [f"encoder.layers.{{4}}.attention.{name}_proj" for name in "qkv"],
    "wav2vec2-conformer": [f"encoder.layers.{{4}}.self_attn.linear_{name}" for name in "qkv"],
    "whisper": BART_QKV,
    "xlm": [f"attentions.{{4}}.{name}_lin" for name in "qkv"],
}

# Mixtures of experts: the module (or the two) in a block whose output is the sum of all experts of a token.
EXPERTS = {
    "mlp": """afmoe aria aria_text axk1 axk2 bailing_hybrid beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32
        deepseek_v4 doge dots1 dots3_note dots3_note_text ernie4_5_moe ernie4_5_vl_moe exaone_moe flex_olmo flint
        glm4_moe glm4_moe_lite glm4v_moe glm4v_moe_text glm5_next glm5_next_text glm_moe_dsa gpt_oss hunyuan_v1_moe
        hy_v3 hy_v4 hy_v4_vl hy_v4_vl_text inkling2 inkling2_loop inkling2_loop_text inkling2_text inkling_mm_model
        inkling_text jetmoe kimi_k25 kimi_linear kolibri1 laguna lara_mini mellum mimo_v2_flash minimax minimax_m2
        minimax_m3_vl minimax_m3_vl_text mistral4 mistral_large4 mistral_large4_text mixtral muse_spark
        muse_spark_text olmoe openai_privacy_filter phimoe qwen2_moe qwen3_5_moe qwen3_5_moe_text qwen3_moe
        qwen3_next qwen3_omni_moe_thinker qwen3_vl_moe qwen3_vl_moe_text sarvam_mla sarvam_moe solar_open step3p7
        switch_transformers unlimited_ocr zaya""",
    "ffn": "dbrx nllb-moe",
    "feed_forward": "jamba lfm2_moe llama4 llama4_text",
    "mixer": "nemo_speechlm nemotron_h",
    "block_sparse_moe": "granitemoe",
    "block_sparse_moe + shared_mlp": "granitemoe_swa granitemoehybrid granitemoeshared",
}
