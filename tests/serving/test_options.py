"""The plug-in's options."""

from __future__ import annotations

import pytest

from redpeft.errors import UserError
from redpeft.serving.options import Options


def test_options_are_checked():
    assert Options.of({}) == Options.of(None) == Options(sites=["ffn"], only=False, folder=None)
    assert Options.of({"redpeft": {"sites": ["attention"], "only": True}}).sites == ["attention"]
    with pytest.raises(UserError, match=r"--additional-config: redpeft\.slots: Extra inputs are not permitted"):
        Options.of({"redpeft": {"slots": 3}})
