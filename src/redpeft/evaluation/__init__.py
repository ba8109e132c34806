"""What language models answer, and how answers score: on questions of one's own and on public benchmarks.

language_model.py  a model that answers; generate.py lets it answer the questions of alpaca_eval.py and mt_bench.py
lm_harness.py      scores by lm-eval, with adapters_lm.py as its model
journal.py         what both have done so far, on disk, so that a killed command goes on
"""
