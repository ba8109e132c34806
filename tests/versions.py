"""What the installed versions of transformers and PEFT can do together."""

import peft
import pytest
import transformers
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION

# add_adapter, set_adapter, delete_adapter, ... raise with an older PEFT than this transformers asks for.
TOO_OLD = (
    f"transformers {transformers.__version__} asks for PEFT {MIN_PEFT_VERSION} in its own add_adapter, ..., and this "
    f"is PEFT {peft.__version__}"
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION)
    else None
)
needs_add_adapter = pytest.mark.skipif(TOO_OLD is not None, reason=str(TOO_OLD))
