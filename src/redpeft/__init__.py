"""redpeft: RED (Representation EDiting, arXiv 2402.15179) for Hugging Face PEFT.

Importing this package registers RED with PEFT: after it, whatever works with a `PeftModel` works with a `RedConfig`.
"""

from redpeft.method import RedConfig, RedLayer, RedModel, Site, calibrate, find_sites

__version__ = "0.1.0"

__all__ = ["RedConfig", "RedLayer", "RedModel", "Site", "calibrate", "find_sites"]
