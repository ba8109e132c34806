"""The paper's tables: which runs they take, what the runs gave, and what was published.

published.yaml     the tables as printed, what each needs, its seeds; published.py reads it
settings.py        reads recipes/paper: the recipe of each row, task and model
plan.py            a table asked for -> runs
probe.py           how long they will take
smoke.py           tiny models and made-up data for `--budget smoke`
aggregate.py       run folders -> cells: means, best k of n, spreads
scored.py          scores that do not come from a run's own test split
report.py          cells beside the published values; layout.py, pages.py and plots.py show them
command.py         `redpeft reproduce`: all of it in order
"""
