"""What the plug-in is told, as `"redpeft"` in vLLM's own `--additional-config`, which reaches all of its processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from redpeft.errors import UserError

KEY = "redpeft"


class Options(BaseModel):
    """`sites`: kinds of sites (ffn, attention) or modules' paths in transformers' model, which get tables of edits.
    `only`: RED alone, so that vLLM makes no LoRA layers. `folder`: a folder or pack whose adapters are served by name;
    no others are then. `check`: whether the engine is tried, when it starts, with an edit at each site.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sites: list[str] = ["ffn"]
    only: bool = False
    folder: Path | None = None
    check: bool = True

    @property
    def explicit(self) -> bool:
        """Whether anyone asked for RED: what cannot be done is an error then, and a warning otherwise."""
        return bool(self.model_fields_set)

    @classmethod
    def of(cls, additional_config: Mapping[str, Any] | None) -> Options:
        """Read from vLLM's `additional_config`. `UserError`: an unknown option, or one of another kind."""
        try:
            return cls.model_validate((additional_config or {}).get(KEY, {}))
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(str(part) for part in (KEY, *problem["loc"]))
            raise UserError(f"--additional-config: {where}: {problem['msg']}") from error
