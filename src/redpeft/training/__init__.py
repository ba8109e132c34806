"""A recipe becomes a trained adapter, and a finished run answers.

recipe.py          every field of a recipe, from files and the command line
baselines.py       the methods that a recipe can name, with their default rates
peft_baselines.py  what the methods of PEFT need of a model; own_baselines.py: the methods that PEFT does not have
train.py           one job from start to end: data, model, training, scores, files
preview.py         what a run will be, before it runs
learner.py         the model that a recipe trains: base model, method and head
encoding.py        rows as tokens, cut and counted
trainer.py         the Trainer of transformers or TRL: arguments, order of rows, optimiser, scores
feedback.py        what TRL's trainers of preferences and rewards need beside that
callbacks.py       checkpoints, metrics, progress and signals while it trains
predict.py         scores and answers of a finished run; rows from answer_files.py and stdin_rows.py
"""
