"""What the plug-in changes within vLLM. Only this package uses vLLM's private names, and `tests/serving/test_names.py`
compares their signatures with those of the version that `plugin.TESTED` allows.

hooks.py             which functions are replaced or wrapped
engine.py            adapters in the workers: reading, tables of edits, slots
checks.py            models and sites that are refused
self_check.py        whether edits act, checked at the start
frontend.py          adapters in the API server: names, the list, loading, reasons of refusals
local_engine.py      an engine in this process, whose adapter is in memory
adapter_metrics.py   counts by adapter on /metrics
"""
