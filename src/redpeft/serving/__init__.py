"""Many edits served from one base model: a plug-in for vLLM, and `redpeft serve`."""
