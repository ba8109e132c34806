"""The paper's tables: which runs they take, what the runs gave, and what was published.

published.yaml      the tables as printed, what each needs, its seeds; published.py reads it
plan.py             a table asked for -> runs, with the settings in recipes/paper
time_estimate.py    how long they will take
smoke.py            tiny models and made-up data for `--budget smoke`
external_scores.py  scores that do not come from a run's own test split
report.py           run folders -> cells beside the published values; page.py shows them
run_tables.py       `redpeft reproduce`: all of it in order
"""
