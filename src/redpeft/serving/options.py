"""The plug-in's options, `"redpeft"` in vLLM's `--additional-config`, which reaches all of its processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from redpeft.errors import UserError

KEY = "redpeft"


class Options(BaseModel):
    """`sites`: kinds of sites (ffn, attention) or modules' paths in transformers' model, which get tables of edits.
    `only`: no adapters but RED's, so that vLLM makes no LoRA layers. `folder`: a folder whose adapters are served by
    name; no others are served then. `check`: whether the engine is tested, when it starts, with an edit at each site.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sites: list[str] = ["ffn"]
    only: bool = False
    folder: Path | None = None
    check: bool = True

    @property
    def explicit(self) -> bool:
        """Whether RED was asked for. If so, what cannot be done is an error, otherwise a warning."""
        return bool(self.model_fields_set)

    @classmethod
    def of(cls, additional_config: Mapping[str, Any] | None) -> Options:
        """Read from vLLM's `additional_config`. `UserError`: an unknown option, or a value of the wrong type."""
        try:
            return cls.model_validate((additional_config or {}).get(KEY, {}))
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(str(part) for part in (KEY, *problem["loc"]))
            raise UserError(f"--additional-config: {where}: {problem['msg']}") from error
