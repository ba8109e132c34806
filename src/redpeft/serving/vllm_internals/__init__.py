"""What the plug-in does inside vLLM's processes. vLLM's private names are touched in this package and nowhere else;
`tests/serving/test_names.py` holds their signatures against the version that `plugin.TESTED` allows."""
