"""Many adapters served from one base model: a plug-in for vLLM, and `redpeft serve`; and GRPO's rollouts.

launch.py          `redpeft serve`: vLLM's command for a base model and a folder of adapters
served_folder.py   the adapters of a folder by name, and what is checked before one is served
served_base.py     the served base model: its sites, and whether an adapter was trained on it
rollouts.py        completions for TRL's GRPOTrainer, by the edit in training
table.py           the edits of one site, and which of them each token gets
counters.py        counts by adapter, shared by a server's processes
options.py         the plug-in's options
plugin.py          the plug-in's entry point
vllm_internals/    what the plug-in changes within vLLM
"""
