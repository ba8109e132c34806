"""A pytest plugin that runs PEFT's own tests with RED among its methods: `make test-peft PEFT=path/to/peft`.

PEFT's tests are read from a source tree of the PEFT that is installed; nothing of them is here. They go over lists of
cases, each a configuration class with its arguments: RED is added to these lists, and of all tests those run that got
a case of RED. The hub's tiny models are replaced by models of the same families that are built on the spot.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from redpeft import RedConfig


def left_out(test: str, case: Mapping[str, Any]) -> str | None:
    """Why RED does not pass a test on purpose. All such tests are here."""
    if test == "test_adapter_dtype_autocast" and not (
        case["autocast_adapter_dtype"] or case["dtype"] == torch.float32
    ):
        return EDITS_ARE_FP32
    if test == "test_add_adapter_no_autocast_adapter_dtype":
        return EDITS_ARE_FP32
    if test == "test_merge_layers" and "task_type" in case["config_kwargs"]:
        family, options = Path(case["model_id"]).name.replace("-", ""), case["config_kwargs"]
        if options.get("use_bias", True) and family.startswith(WITHOUT_BIASES.get(options.get("sites", "ffn"), ())):
            return (
                "a checkpoint of this family has no place for the bias that a merged layer has got; a warning says so"
            )
    if test == "test_from_pretrained_missing_keys_warning":
        return "a missing key is an error with RED, not a warning"
    if test in ("test_warning_name_transformers_model", *(f"test_load_{name}" for name in OF_THE_HUB)):
        return "asks for a model of the hub"
    if test == "test_key_mapping_save_old_load_new_lora":
        return "an adapter of RED names its modules in full, and is refused where they have got other names since"
    if test.startswith("test_mixed_model_") or case.get("cls") is peft.PeftMixedModel:
        return "RED does not mix with other methods in a PeftMixedModel"
    if "_low_cpu_mem_usage_works" in test and test.startswith("test_get_peft_model_"):
        return "looks for parameters that are called lora_"
    return None


OF_THE_HUB = ("from_hub_then_offline_model", "checkpoint_offline_non_default_cache_dir")
EDITS_ARE_FP32 = "edits are fp32 on bases of 16 bits too, also with autocast_adapter_dtype=False"
WITHOUT_BIASES = {
    "ffn": ("T5", "Qwen2", "Gemma3"),
    "red+": ("T5", "Qwen2", "Gemma3", "GPTJ", "Deberta"),
}

MLP = [
    ("MLP by an expression", {"target_modules": "lin0"}),
    ("MLP first", {"target_modules": ["lin0"]}),
    ("MLP last", {"target_modules": ["lin1"]}),
    ("MLP both", {"target_modules": ["lin0", "lin1"]}),
    ("MLP saved", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP both and saved", {"target_modules": ["lin0", "lin1"], "modules_to_save": ["lin1"]}),
    ("MLP scale only", {"target_modules": ["lin0"], "use_bias": False}),
    ("MLP bias only", {"target_modules": ["lin0"], "use_scale": False}),
    ("MLP unit 1", {"target_modules": ["lin0"], "unit": 1.0}),
]
CONV1D = [
    ("Conv1D", {"target_modules": ["conv1d"]}),
    ("Conv1D and linear", {"target_modules": ["conv1d", "lin0"]}),
    ("Conv1D saved", {"target_modules": ["conv1d"], "modules_to_save": ["lin0"]}),
]
PAIRS = [
    ("Same", ["lin0"], ["lin0"], {}),
    ("Different", ["lin0"], ["lin1"], {}),
    ("Scale and bias", ["lin0"], ["lin0"], {"use_scale": False}),
]
MATRICES = {
    "test_decoder_models": "CAUSAL_LM",
    "test_encoder_decoder_models": "SEQ_2_SEQ_LM",
    "test_feature_extraction_models": "FEATURE_EXTRACTION",
    "test_seq_classifier": "SEQ_CLS",
}
OPTIONS: list[dict[str, Any]] = [{}, {"sites": "red+"}, {"use_bias": False}, {"use_scale": False}, {"unit": 1.0}]

FOR_ALL_METHODS = {
    "TestNoInfiniteRecursionDeepspeed",
    "TestLoadAdapterOfflineMode",
    "TestCustomModelConfigWarning",
    "TestLowCpuMemUsage",
    "TestNamingConflictWarning",
    "TestLoadPeftKeyMapping",
    "test_from_pretrained_missing_keys_warning",
}

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
}
GPT = {
    "vocab_size": 1000,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "rotary_dim": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = {"vocab_size": 1000, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 37, "num_hidden_layers": 2}
SEQ2SEQ = {"vocab_size": 1000, "d_model": 32, "decoder_start_token_id": 0, "pad_token_id": 0}
T5 = {**SEQ2SEQ, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
BART = {
    **SEQ2SEQ,
    **{f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("layers", 2), ("ffn_dim", 37))},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
}
MODELS = {
    "test_decoder_models": {
        "OPTForCausalLM": {**DECODER, "num_attention_heads": 4},
        "GPT2LMHeadModel": GPT,
        "GPTJForCausalLM": GPT,
        "LlamaForCausalLM": SIZES,
        "Qwen2ForCausalLM": {**SIZES, "num_key_value_heads": 2},
        "Gemma3ForCausalLM": {**SIZES, "num_key_value_heads": 2, "head_dim": 8},
    },
    "test_encoder_decoder_models": {"T5ForConditionalGeneration": T5, "BartForConditionalGeneration": BART},
    "test_feature_extraction_models": dict.fromkeys(
        ("BertModel", "RobertaModel", "DebertaModel", "DebertaV2Model"), SIZES
    ),
    "test_seq_classifier": dict.fromkeys(("BertForSequenceClassification", "RobertaForSequenceClassification"), SIZES),
}


def pytest_configure(config: pytest.Config) -> None:
    tree = Path(os.environ["PEFT"]).resolve()
    _check_version(tree)
    package = types.ModuleType("tests")  # the tests import each other as a package, which a source archive is not
    package.__path__ = [str(tree / "tests")]
    sys.modules["tests"] = package
    if importlib.util.find_spec("diffusers") is None:  # imported by all tests, used by those of image models
        sys.modules["diffusers"] = stub = types.ModuleType("diffusers")
        stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    folder = tempfile.TemporaryDirectory(prefix="tiny-models-")
    config.add_cleanup(folder.cleanup)
    _add_to_custom_models()
    _take_loras_place(Path(folder.name))
    for name, task in MATRICES.items():
        module = importlib.import_module(f"tests.{name}")
        module.ALL_CONFIGS += [(RedConfig, {"task_type": task, "target_modules": None, **more}) for more in OPTIONS]
        (models,) = (
            value for key, value in vars(module).items() if key.startswith("PEFT_") and key.endswith("_TO_TEST")
        )
        models[:] = [_build(family, sizes, Path(folder.name)) for family, sizes in MODELS[name].items()]


def _check_version(tree: Path) -> None:
    file = tree / "src" / "peft" / "__init__.py"
    if not (file.is_file() and (tree / "tests" / "testing_common.py").is_file()):
        pytest.exit(f"{tree} is not a source tree of PEFT with its tests", returncode=2)
    (line,) = (line for line in file.read_text().splitlines() if line.startswith("__version__"))
    theirs = line.split('"')[1]
    if theirs.split(".")[:2] != peft.__version__.split(".")[:2]:
        pytest.exit(f"{tree} is PEFT {theirs}, and PEFT {peft.__version__} is installed", returncode=2)


def _add_to_custom_models() -> None:
    module = importlib.import_module("tests.test_custom_models")
    module.TEST_CASES += [(f"RED {name}", "MLP", RedConfig, options) for name, options in MLP]
    module.TEST_CASES += [(f"RED {name}", "EmbConv1D", RedConfig, options) for name, options in CONV1D]
    module.ALL_PEFT_CONFIG_CLASSES.append(RedConfig)
    for name, first, second, more in PAIRS:
        options = [{"target_modules": names, "init_weights": False} for names in (first, second)]
        case = (f"RED {name}", "redpeft", RedConfig, options[0], options[1] | more)
        module.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES.append(case)
        module.MIXED_ADAPTER_TEST_CASES.append((f"RED {name}", *(RedConfig(**each) for each in case[3:])))
    for tests in vars(module).values():
        for test in vars(tests).values() if isinstance(tests, type) else ():
            for mark in getattr(test, "pytestmark", ()):
                if mark.name == "parametrize" and mark.args[0] == "config_cls" and _most_methods(mark.args[1]):
                    mark.args[1].append(RedConfig)


def _take_loras_place(folder: Path) -> None:
    """The tests of initialisation that stand for all methods use LoRA: here RED does."""
    module = importlib.import_module("tests.test_initialization")
    path = _build("OPTForCausalLM", MODELS["test_decoder_models"]["OPTForCausalLM"], folder)

    def red(init_lora_weights: bool = True, **options: Any) -> RedConfig:
        return RedConfig(init_weights=init_lora_weights, **options)

    def load(name: str | Path) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(path if "/tiny-random-OPT" in str(name) else name)

    module.LoraConfig = red
    module.AutoModelForCausalLM = types.SimpleNamespace(from_pretrained=load)


def _most_methods(values: Any) -> bool:
    return isinstance(values, list) and len(values) >= 5 and RedConfig not in values


def _build(family: str, sizes: dict[str, Any], folder: Path) -> str:
    """A tiny model of this family with random weights, saved; its folder."""
    torch.manual_seed(0)
    model_class = getattr(transformers, family)
    path = folder / f"{family[:2]}-{family[2:]}"  # by some names, "gpt2" or "llama", methods get other tests or none
    model_class(model_class.config_class(**sizes)).save_pretrained(path)
    return str(path)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.hook.pytest_deselected(items=[item for item in items if not _is_red(item)])
    items[:] = [item for item in items if _is_red(item)]
    for item in items:
        if reason := left_out(item.originalname, item.callspec.params if hasattr(item, "callspec") else {}):
            item.add_marker(pytest.mark.skip(reason=reason))


def _is_red(item: pytest.Item) -> bool:
    if item.path.stem == "test_initialization":
        others = item.name.endswith(("_prefix_tuning", "_vblora"))
        return not others and (item.cls.__name__ if item.cls else item.name) in FOR_ALL_METHODS
    cases = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return any(value is RedConfig or isinstance(value, RedConfig) for value in cases)
