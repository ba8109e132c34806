"""Make RED a method that PEFT knows: its type, its configuration and its tuner.

PEFT's `PeftType` is a closed enum, and a plain string in its place breaks `transformers`' `load_adapter`, so `REDPEFT`
becomes a real member of it. Only this module touches the internals of `enum`; its test fails when they or PEFT move.

The type is `REDPEFT` and the prefix `redpeft_` (not `RED`, `red_`): PEFT and transformers look for a prefix inside
module names, and `red_` is part of `shared_expert` and `pred_head`. And a reader who lacks this library sees in
`adapter_config.json` what to install.
"""

from __future__ import annotations

from peft.utils.peft_types import PeftType, register_peft_method

NAME = "REDPEFT"
PREFIX = "redpeft_"


def _add_peft_type() -> PeftType:
    """Add the member `PeftType.REDPEFT`; adding it twice changes nothing."""
    if NAME in PeftType.__members__:
        return PeftType[NAME]
    member = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    PeftType._member_map_[NAME] = member
    PeftType._member_names_.append(NAME)
    PeftType._value2member_map_[NAME] = member
    type.__setattr__(PeftType, NAME, member)  # EnumType's own __setattr__ refuses to touch members
    return member


REDPEFT = _add_peft_type()


def register(config_cls: type, model_cls: type) -> None:
    """Register RED's configuration and tuner with PEFT; a second call (a reloaded module) changes nothing."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    if REDPEFT not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)
