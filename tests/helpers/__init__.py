"""What tests of several packages share: tiny models, data sets and adapters, all made on the spot.

models.py           tokenizers and tiny models of random weights
data.py             rows, and files of every format
tasks.py            data sets and tasks from columns in memory
adapters.py         adapter folders and runs, written by hand
language_models.py  a language model whose answers differ, and adapters of it
training.py         a few steps of training
table_runs.py       runs of the paper's tables, without training
versions.py         what the installed transformers and PEFT can do together
"""
