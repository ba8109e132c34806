"""RED's place in PEFT. When PEFT or `enum` moves, this is where it must be seen first."""

import pickle

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType

import redpeft
from redpeft.tuner.register import REDPEFT, register


def test_redpeft_is_a_real_member_of_pefts_enum():
    assert PeftType.REDPEFT is REDPEFT
    assert PeftType("REDPEFT") is PeftType["REDPEFT"] is REDPEFT
    assert isinstance(REDPEFT, PeftType)
    assert REDPEFT in list(PeftType)
    assert REDPEFT == "REDPEFT"
    assert REDPEFT.value == REDPEFT.name == "REDPEFT"
    assert pickle.loads(pickle.dumps(REDPEFT)) is REDPEFT
    assert PeftType.LORA is not REDPEFT
    with pytest.raises(ValueError, match="NOSUCH"):
        PeftType("NOSUCH")


def test_peft_knows_the_method():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[REDPEFT] is redpeft.RedConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[REDPEFT] is redpeft.RedModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[REDPEFT] == "redpeft_" == redpeft.RedModel.prefix


def test_registering_again_changes_nothing():
    members = list(PeftType)
    register(redpeft.RedConfig, redpeft.RedModel)
    assert list(PeftType) == members


def test_a_config_without_the_library_names_it():
    config = redpeft.RedConfig()
    assert config.to_dict()["peft_type"] == "REDPEFT"
    assert isinstance(config, peft.PeftConfig)
