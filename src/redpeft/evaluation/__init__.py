"""What language models answer, and how answers score: on questions of one's own and on public benchmarks.

language_model.py  a model that answers: a model folder, a run, or a base model with an adapter
answers.py         its answers, word by word, with adapters and sums of them: several are rows of one batch
chat.py            a chat with it in the terminal, in which adapters take turns and are mixed
generate.py        lets it answer the questions of AlpacaEval and MT-Bench, whose files question_files.py knows
lm_harness.py      scores by lm-eval, with adapters_lm.py as its model
"""
