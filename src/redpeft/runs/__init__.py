"""Many runs: lists of jobs, resumed where they were left, side by side in fleets or spread over machines.

runner.py       jobs or seeds -> results; which of them share a fleet
on_ray.py       the same on the machines of a Ray cluster
experiment.py   many jobs with one output folder, and what is known of them
sweep.py        `redpeft sweep`: an experiment from a grid of fields and seeds
job_list.py     `redpeft fleet`: an experiment from a list of jobs, or a folder of data
progress.py     how far the jobs are: a live table, or lines
reports.py      what people read at the end; pages.py writes it as Markdown and HTML
"""
