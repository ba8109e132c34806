"""What is learned and how it is scored.

base.py                  what a task is, and which there are
classification.py        classes and numbers; labels.py reads them
token_classification.py  a tag for each word
instruction.py           a response to a prompt; e2e.py: texts from facts
preference.py            the better of two responses
text_to_text.py          labels as words, for encoder-decoders
data.py                  the splits of a data set; columns.py finds the columns, rows.py checks and limits the rows
files.py                 data files of all formats, and streams
metrics.py               the scores
"""
