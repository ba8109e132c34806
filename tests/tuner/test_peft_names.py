"""The private names of PEFT that redpeft overrides or sets: why, and what they look like there."""

from __future__ import annotations

import inspect

import peft
import pytest
from packaging.version import Version
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

from redpeft import RedLayer, RedModel

NEW = "0.19"  # the first PEFT that lets a tuner look at the keys of files

# name: (why it is overridden, its parameters in PEFT, the first PEFT that has it)
TUNER = {
    "_check_target_module_exists": ("full names are no endings", "peft_config, key", ""),
    "_create_and_replace": (
        "PEFT's is abstract: what a site is wrapped in",
        "peft_config, adapter_name, target, target_name, parent, current_key, parameter_name",
        "",
    ),
    "_replace_module": ("edits lie on the right device already", "parent, child_name, new_module, child", ""),
    "_remove_adapter_name_from_key": ("names of compiled models become plain", "key, adapter_name", NEW),
    "_remap_adapter_state_dict_for_load": (
        "keys that are missing or left over are an error, and an edit takes either name of its scale",
        "model, config, adapter_name, state_dict",
        NEW,
    ),
    "_check_merge_allowed": ("what cannot be merged is refused before anything changes", "", ""),
}
LAYER = {
    "_move_adapter_to_device_of_base_layer": (
        "PEFT's looks for `weight`, and casts to the base's dtype",
        "adapter_name, device",
        "",
    ),
}
HOOKS = "_enable_peft_forward_hooks"  # of a PeftModel's, which asks its tuner for it: batches that mix adapters
SET = "_active_adapter"  # an attribute of a layer, which PEFT's own methods read


def overridden(ours: type, theirs: type) -> set[str]:
    private = {name for name in vars(ours) if name.startswith("_") and not name.startswith("__")}
    return {name for name in private if hasattr(theirs, name) and not name.startswith("_abc")}


@pytest.mark.parametrize(
    ("ours", "theirs", "table"), [(RedModel, BaseTuner, TUNER), (RedLayer, BaseTunerLayer, LAYER)]
)
def test_what_is_overridden_stands_here_and_is_what_peft_has(ours, theirs, table):
    there = {name for name, (_, _, since) in table.items() if not since or hasattr(theirs, name)}
    assert overridden(ours, theirs) == there
    for name in there:
        parameters = [each for each in inspect.signature(getattr(theirs, name)).parameters if each != "self"]
        assert parameters == [each for each in table[name][1].split(", ") if each], name
    if Version(peft.__version__) >= Version(NEW):
        assert there == set(table)


def test_peft_enters_the_tuners_hooks_around_forward_and_generate():
    assert hasattr(RedModel, HOOKS)
    assert not hasattr(BaseTuner, HOOKS)
    assert f"self.base_model.{HOOKS}(*args, **kwargs)" in inspect.getsource(peft.PeftModel)
    assert inspect.signature(getattr(peft.LoraModel, HOOKS)).parameters.keys() == {"self", "args", "kwargs"}


def test_the_attribute_that_is_set_is_read_by_peft():
    assert SET in vars(BaseTunerLayer)
