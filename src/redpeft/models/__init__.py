"""Base models: loading and building them, and what is known of them. Everything is imported from here.

base_files.py  where a base model's files are: short names, folders, GGUF files and what they say of themselves
loading.py     models, tokenizers and configurations; models without weights; weights that a checkpoint lacks
formats.py     number formats and quantised weights
inputs.py      tokens and padding, how long a row may be, random inputs
modules.py     widths, places for biases, fingerprints, compiled modules, memory
"""

# ruff: noqa: F401

from redpeft.models.base_files import GGUF, SHORT_NAMES, PackagedBase, find_base, read_gguf_header
from redpeft.models.formats import (
    DTYPE_ARGUMENT,
    DTYPES,
    FLOATS,
    PACKS,
    QUANTISERS,
    SLOW_BF16,
    autocast,
    bf16_slowdown,
    choose_precision,
    dtype_name,
    leave_unpacked,
    quantised_weights,
    quantization_config,
    require_quantiser,
    training_device,
)
from redpeft.models.inputs import (
    Limit,
    end_tokens,
    ensure_pad_token,
    example_inputs,
    input_limit,
    known_tokens,
    pad_prompts,
    positions,
    tokenizer_digest,
)
from redpeft.models.loading import (
    adapter_tokenizer,
    checkpoint_class,
    draw_weights,
    empty_model,
    export_base,
    load_classifier,
    load_config,
    load_decoder,
    load_pretrained,
    load_tokenizer,
    loading_report,
    new_weights,
    on_meta,
    quiet,
    read_chat_template,
)
from redpeft.models.modules import (
    add_biases,
    allow_fast_path,
    compile_in_place,
    device_and_dtype,
    fingerprint,
    fingerprint_difference,
    fingerprint_of,
    free_memory,
    keep_modes_and_rng,
    linear_widths,
    output_width,
    peak_memory,
    plain_name,
    reads_tying,
    switch_on_biases,
    unwrapped,
)
