"""An adapter of another base model than the one on disk is told by its fingerprint."""

from __future__ import annotations

import logging
import shutil

import pytest
from transformers import AutoConfig

from redpeft.adapters import read_adapter
from redpeft.errors import UserError
from redpeft.serving.base import Base

from .making import SITES, adapter

NAMED = {site: site for site in SITES}


@pytest.fixture
def check(base, tmp_path):
    def check(saved, sites=NAMED, name=None, **options):
        folder = adapter(tmp_path / "edit", 1, list(sites), base_fingerprint=saved)
        config = AutoConfig.from_pretrained(base)
        config.quantization_config = options.pop("quantised", None)
        Base(str(name or base), config, **options).check(read_adapter(folder), sites)

    return check


def test_its_own_base_and_none_named_are_let_through(check, own_fingerprint):
    check(own_fingerprint)
    check(None)


def test_other_weights_are_refused(check, other_fingerprint, base):
    with pytest.raises(UserError, match=f"edit is for another base model than {base}: the weights differ"):
        check(other_fingerprint)


def test_other_shapes_are_refused(check, own_fingerprint):
    with pytest.raises(UserError, match="the edited modules have other names or shapes"):
        check({**own_fingerprint, "shapes": "0" * 16})


def test_modules_may_have_other_names_in_the_adapter(base, check):
    """As where it was trained on the model without its head."""
    from transformers import AutoModel

    from redpeft.models import fingerprint

    own = {site.removeprefix("model."): site for site in SITES}
    saved = fingerprint(AutoModel.from_pretrained(base), own)
    check(saved, own)
    with pytest.raises(UserError, match="the weights differ"):
        check({**saved, "samples": saved["samples"][::-1]}, own)


def test_of_a_name_on_the_hub_the_files_are_those_that_the_engine_has_downloaded(
    check, base, own_fingerprint, other_fingerprint, tmp_path
):
    cached = tmp_path / "cache" / "models--some--base"
    shutil.copytree(base, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "v1").write_text("abc")
    hub = {"name": "some/base", "revision": "v1", "cache": str(tmp_path / "cache")}
    check(own_fingerprint, **hub)
    with pytest.raises(UserError, match="is for another base model than some/base: the weights differ"):
        check(other_fingerprint, **hub)


@pytest.mark.parametrize("kind", ["no weights", "no such model", "quantised"])
def test_where_there_is_nothing_to_compare_it_is_let_through_with_a_word(
    check, base, other_fingerprint, tmp_path, caplog, kind
):
    shutil.copytree(base, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    options = {
        "no weights": {"name": tmp_path / "empty"},
        "no such model": {"name": "nobody/no-such-model"},
        "quantised": {"quantised": {"quant_method": "gptq"}},
    }
    with caplog.at_level(logging.INFO, "vllm.redpeft"):
        check(other_fingerprint, **options[kind])
    assert "adapters of another base model than " in caplog.text
    assert " cannot be detected: " in caplog.text
