"""Fold a trained edit into a plain checkpoint: the same function, with no trace of redpeft.

folding.py     the whole: plan, survey, write
plan.py        what a stock checkpoint can carry, site by site, from the configuration alone
llama.py       models that are Llama by another name
outline.py     the model that an adapter belongs to, without weights
checkpoint.py  the base's tensors, read one at a time;  names.py: which of them is which of the model's
ties.py        weights that are one tensor in several modules, of which the adapter changes some
base.py        whether it is the base that the adapter was trained on
survey.py      what becomes of every site;  exactness.py: what rounding does to it
write.py       the new checkpoint, shard by shard
"""

from redpeft.adapters.fold.folding import FoldPreview, FoldResult, fold, preview_fold

__all__ = ["FoldPreview", "FoldResult", "fold", "preview_fold"]
