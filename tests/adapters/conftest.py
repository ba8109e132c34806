from __future__ import annotations

import pytest

from helpers.adapters import random_tensors, write_folder


@pytest.fixture
def adapter_folder(tmp_path):
    return write_folder(tmp_path / "adapter", random_tensors())
