"""RedConfig: its defaults, what it refuses, and that it survives a save."""

import json

import pytest
from peft import PeftConfig

from redpeft import RedConfig
from redpeft.errors import UserError


def test_the_defaults_are_the_papers_site_and_a_measured_unit():
    config = RedConfig()
    assert (config.sites, config.target_modules, config.unit) == ("ffn", None, "auto")
    assert config.use_scale
    assert config.use_bias
    assert config.peft_type == "REDPEFT"


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"sites": "fnn"}, "unknown sites .'fnn'.: choose among ffn, attention, qkv"),
        ({"sites": []}, "sites is empty"),
        ({"sites": ["ffn", "mlp"]}, "unknown sites .'mlp'."),
        ({"sites": "ffn", "target_modules": ["down_proj"]}, "both say where to edit; give one"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"layers_to_transform": []}, "layers_to_transform is empty"),
        ({"target_modules": ".*dense", "layers_to_transform": [1]}, "put the blocks into it"),
        ({"use_scale": False, "use_bias": False}, "nothing would be learned"),
        ({"unit": 0}, "unit must be 'auto' or a positive number, not 0"),
        ({"unit": -1.0}, "positive number"),
        ({"unit": "median"}, "unit must be 'auto'"),
        ({"unit": float("nan")}, "positive number"),
        ({"unit": True}, "positive number"),
        ({"scale_origin": 0.5}, "scale_origin must be 1, or 0 for the paper's own rule, not 0.5"),
    ],
)
def test_contradictory_or_empty_choices_are_errors(choices, message):
    with pytest.raises(UserError, match=message):
        RedConfig(**choices)


def test_several_sites_in_one_text_are_a_list():
    assert RedConfig(sites="ffn, qkv").sites == ["ffn", "qkv"]


def test_a_resolved_configuration_keeps_what_was_asked_beside_what_was_found(tmp_path):
    config = RedConfig(sites="red+", target_modules=["b", "a"], resolved=True, use_bias=False, unit=0.5)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "REDPEFT"
    again = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(again, RedConfig)
    assert again.sites == "red+"
    assert set(again.target_modules) == {"a", "b"}
    assert (again.use_bias, again.unit) == (False, 0.5)
