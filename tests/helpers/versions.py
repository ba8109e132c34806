"""What the installed versions of transformers and PEFT can do together."""

import peft
import pytest
import transformers
from packaging.version import Version
from peft.tuners.tuners_utils import BaseTuner
from transformers.integrations.peft import MIN_PEFT_VERSION

# add_adapter, set_adapter, delete_adapter, ... raise with an older PEFT than this transformers asks for.
TOO_OLD = (
    f"transformers {transformers.__version__} asks for PEFT {MIN_PEFT_VERSION} in its own add_adapter, ..., and this "
    f"is PEFT {peft.__version__}"
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION)
    else None
)
needs_add_adapter = pytest.mark.skipif(TOO_OLD is not None, reason=str(TOO_OLD))

keys_go_through_the_tuner = pytest.mark.skipif(
    not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"),
    reason=f"PEFT {peft.__version__} lets no tuner look at the keys of a file",
)
