"""Fold a trained edit into a plain checkpoint: the same function, with no trace of redpeft.

folding.py    the whole fold, from top to bottom, and its result
placement.py where each edit goes in a stock checkpoint, by configurations alone; tied weights; the preview
llama.py      models that can be written as Llama
layers.py     the folded layers, and what rounding does to them
write.py      the new checkpoint, file by file
"""

from redpeft.adapters.fold.folding import FoldResult, fold, preview_table, result_table
from redpeft.adapters.fold.placement import FoldPreview, preview_fold

__all__ = ["FoldPreview", "FoldResult", "fold", "preview_fold", "preview_table", "result_table"]
