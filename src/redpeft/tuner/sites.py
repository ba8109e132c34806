"""Where to edit: finds the sites of a transformer by its structure, with no table of model names.

    ModuleList ─> block 0, block 1, ...        one block, of width d (the commonest in it):

           ┌──────────────── attention ───────────────┐         ┌─────────────── FFN ──────────────┐
    h ───> │ query, key, value ───────────> output    │ ─ + ──> │ up: d -> f ──────> down: f -> d  │ ─ + ──> h
           └────── "qkv" ──────────────── "attention" ┘         └──────────────────────── "ffn" ───┘

A block is a member of a `ModuleList` or `Sequential`. Of lists within lists, one whose members attend is a stack of
blocks (Swin's stages, ALBERT's groups), and one of unlike parts belongs to the block around it (T5's `layer`).

- "ffn": leave out attention, state-space mixers, adapters and bottlenecks. Of the linears that remain, the FFN's make
  the widest detour: from d up to f (or 2f: gate and up fused) and back. The site is the one that leads back; the last
  one where up and down look alike, or where a block has FFNs on both sides of its attention (conformers).
  Experts are edited together, at the smallest module that holds them all: its output is their sum. Where the block
  itself adds a shared expert to that (GraniteMoeShared), the site has two parts (`added`). Where it norms the sum of
  its experts and an FFN beside them (Gemma 4), the norm's output is the site.
- "attention": in each self-attention, the linear back to d that is no query, key, value, gate or position.
- "qkv": in each self-attention, the linears named after query, key and value, which must be each of them exactly once;
  or the only linear beside the output, which holds them fused.

Of a model with several towers the one that reads text is edited (LLaVA, CLIP); both sides of an encoder-decoder are,
and so is a lone vision or speech encoder. For another tower name its modules by `target_modules`. Attention is known
by "attn" or "attention" in the names of modules or classes, cross-attention by "cross", "encdec" or "encoder_att".
A convolution of size 1 is no site: the last dimension of its output is not the width.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from redpeft.errors import UserError
from redpeft.models import unwrapped

KINDS = ("ffn", "attention", "qkv")
RED_PLUS = "red+"
RED_PLUS_KINDS = ("ffn", "attention", "qkv")  # the paper's enhanced variant; a kind to come is no part of it

SHARED_EXPERT = "shared_mlp"  # as GraniteMoeShared calls what it adds to its experts

_ATTENTION = re.compile(r"attn|attention|(^|_)att($|_)", re.I)
_CROSS = re.compile(r"cross|enc_?dec|encoder_att", re.I)
_ASIDE = re.compile(r"mamba|(^|_)ssm|bottleneck|adapter", re.I)  # neither attention nor FFN
_EXPERT = re.compile(r"expert|moe$", re.I)
_NORM = re.compile(r"norm(\dd|gated)?$", re.I)
_AFTER_FFN = re.compile(r"post_(feed_?forward|ffn|mlp)_(layer_?)?norm$")
_QKV = re.compile(r"(?:^|_)w?(?:(qkv|qk|kv|q|k|v)|(q)uer(?:y|ies)|(k)eys?|(v)alues?)(?=_|$)", re.I)
_OUTPUT = re.compile(r"(^|[._])(o|out|output)($|[._])", re.I)
_GATE = re.compile(r"gate|position|relative|(^|[._])(pos|rel)($|[._])", re.I)

Named = tuple[str, nn.Module]
Skip = Callable[[str, nn.Module], bool]
Linear = tuple[str, int, int]  # name, width in, width out


@dataclass(frozen=True)
class Site:
    """A module whose output is edited.

    Attributes:
        name: its full name in the model.
        kind: "ffn", "attention" or "qkv".
        width: of its output.
        layer: the index of its block within its stack (the first blocks of T5's encoder and of its decoder have 0).
        added: the full name of a module whose output the block adds to this one's, and which the same edit acts on: a
            shared expert beside its experts. None for nearly all sites.
    """

    name: str
    kind: str
    width: int
    layer: int
    added: str | None = None


def find_sites(
    model: nn.Module, sites: str | Sequence[str] = "ffn", layers: Sequence[int] | int | None = None
) -> list[Site]:
    """The sites of a model of repeated blocks, in the model's order. Reads no weights: the meta device will do.

    PEFT layers and what `torch.compile` wraps count as the modules within, under the plain model's names. A module
    that several blocks share is one site.

    Args:
        sites: "ffn", "attention" (the output projection), "qkv" (a fused projection is one site), a list of these, or
            "red+" for these three, the paper's enhanced variant.
        layers: keep the blocks with these indices.

    Raises `UserError`, which lists the blocks and linears seen, where a kind is not found or in doubt.
    """
    model = unwrapped(model)
    model = unwrapped(model.get_base_model()) if isinstance(model, PeftModel) else model
    blocks = _edited_blocks(model)
    modules = dict(_walk("", model))
    found: dict[int, Site] = {}  # by module
    for kind in _kinds(sites):
        of_block = {block.name: block.sites(kind) for block in blocks}
        _check(kind, of_block, blocks, model)
        for site in chain.from_iterable(of_block.values()):
            found.setdefault(id(modules[site.name]), site)
    order = {name: position for position, name in enumerate(modules)}
    ordered = sorted(found.values(), key=lambda site: order[site.name])
    return ordered if layers is None else _of_layers(ordered, [layers] if isinstance(layers, int) else list(layers))


def find_blocks(model: nn.Module) -> dict[str, list[str]]:
    """The blocks that `find_sites` looks into: names in the model's order, by the name of the stack that they are in.

    Raises `UserError` for a model without repeated blocks.
    """
    stacks: dict[str, list[str]] = {}
    for block in _edited_blocks(model):
        stacks.setdefault(_parent(block.name), []).append(block.name)
    if not stacks:
        raise UserError(f"{type(model).__name__} has no repeated blocks")
    return stacks


def _kinds(sites: str | Sequence[str]) -> list[str]:
    asked = {sites} if isinstance(sites, str) else set(sites)
    if not asked or not asked <= {*KINDS, RED_PLUS}:
        raise UserError(f"sites={sites!r}: choose among {', '.join(KINDS)} and '{RED_PLUS}'")
    asked |= set(RED_PLUS_KINDS) if RED_PLUS in asked else set()
    return [kind for kind in KINDS if kind in asked]


def _of_layers(sites: list[Site], layers: list[int]) -> list[Site]:
    known = sorted({site.layer for site in sites})
    if unknown := [layer for layer in layers if layer not in known]:
        raise UserError(f"no block to edit has the index {unknown}; those of this model have {known}")
    return [site for site in sites if site.layer in layers]


# --- blocks ----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Block:
    """A repeated block, within the part of the model that has a configuration of its own (`tower`)."""

    name: str
    module: nn.Module
    index: int
    tower: nn.Module

    def sites(self, kind: str) -> list[Site]:
        if kind == "ffn":
            if len(self.ffn) > 1:
                raise UserError(_doubt(kind, [self], f": {', '.join(self.ffn)} could each be it"))
            return [Site(name, kind, self.width, self.index, self._added(name)) for name in self.ffn]
        pick = self._output if kind == "attention" else self._query_key_value
        return [Site(name, kind, out, self.index) for named in self.attentions for name, _, out in pick(*named)]

    @cached_property
    def width(self) -> int:
        """The commonest width in the block: of all that its linears read and write, and of its norms."""
        votes: Counter[int] = Counter()
        for _, module in _walk(self.name, self.module):
            weight = getattr(module, "weight", None)
            if widths := _widths(module):
                votes.update(widths)
            elif isinstance(weight, torch.Tensor) and weight.dim() == 1:
                votes[len(weight)] += 1
        return max(votes, key=votes.__getitem__, default=0)

    @cached_property
    def attends(self) -> bool:
        return any(_is_attention(*named) for named in [(self.name, self.module), *_walk(self.name, self.module)])

    @cached_property
    def ffn(self) -> list[str]:
        """The module whose output is the FFN's; nothing where there is none, several where it is in doubt."""
        if _is_attention(self.name, self.module):
            return []
        parts = list(_walk(self.name, self.module, _is_attention))
        if experts := [name for name, module in parts if _says(_EXPERT, name, module)]:
            around = [n for n, m in parts if not _is_list(m) and all(name.startswith(f"{n}.") for name in experts)]
            return self._with_experts(around[-1] if around else experts[0], parts)
        linears = _linears(self.name, self.module, _is_no_ffn)
        ways_back = _ways_back(linears, self.width)
        inner = max((start for _, start in ways_back), default=0)
        back = [name for name, start in ways_back if start == inner]
        # A prediction head is a small MLP with neither attention nor norm; XLM keeps its FFNs apart from these too.
        if inner <= self.width and not self.attends and not any(_says(_NORM, *part) for part in parts):
            return []
        if inner == self.width:
            return back[-1:]  # up and down look alike
        # RWKV multiplies what leads back by what a linear beside it makes: neither is the FFN's output.
        beside = {_parent(name) for name, *widths in linears if widths == [self.width, self.width]}
        if 2 * inner != self.width and any(_parent(name) in beside for name in back):
            return []
        return back[-1:] if self._attention_between(back[-2:]) else back

    def _with_experts(self, experts: str, parts: list[Named]) -> list[str]:
        """The site of a block with experts, whose sum is the output of the module `experts`."""
        siblings = [named for named in parts if _parent(named[0]) == _parent(experts) and named[0] != experts]
        each = [one for named in siblings for one in (_children(*named) if _is_list(named[1]) else [named])]
        others = [named for named in each if not (_says(_NORM, *named) or _says(_ASIDE, *named))]
        dense = [named[0] for named in others if _ways_back(_linears(*named), self.width)]
        if not dense or _last(dense[0]) == shared_expert(dict(parts)[experts], siblings):
            return [experts]
        # Gemma 4 norms the sum of its experts and its dense FFN. LongCat-Flash adds its experts later than the FFN
        # beside them, behind one more attention: nowhere is their sum.
        return [name for name, _ in siblings if _AFTER_FFN.search(name)] or [experts, *dense]

    def _added(self, site: str) -> str | None:
        modules = {self.name: self.module, **dict(_walk(self.name, self.module))}
        added = shared_expert(modules[site], _children("", modules[_parent(site)]))
        return added and f"{_parent(site)}.{added}"

    def _attention_between(self, names: list[str]) -> bool:
        """Whether attention is declared between two modules, as it is between the halves of a conformer's FFN."""
        order = [(name in names, _is_attention(name, module)) for name, module in _walk(self.name, self.module)]
        here = [position for position, (is_one, _) in enumerate(order) if is_one]
        return len(here) == 2 and any(attends for _, attends in order[here[0] : here[1]])

    @cached_property
    def attentions(self) -> list[Named]:
        """The self-attentions in the block; the block itself where a model keeps its attentions in a list (XLM)."""
        within = [(self.name, self.module), *_walk(self.name, self.module, _is_aside)]
        found = [named for named in within if _is_attention(*named)]
        topmost = [named for named in found if not any(named[0].startswith(f"{outer}.") for outer, _ in found)]
        each = [one for named in topmost for one in (_children(*named) if _is_list(named[1]) else [named])]
        own = [named for named in each if not _says(_CROSS, *named) and _linears(*named)]
        return [named for named in own if not any(_reads_weights(type(part)) for part in named[1].modules())]  # type: ignore

    def _output(self, name: str, attention: nn.Module) -> list[Linear]:
        back = [linear for linear, letters in _lettered(name, attention) if not letters and linear[2] == self.width]
        if not back:
            raise UserError(_doubt("attention", [self]))
        return ([linear for linear in back if _OUTPUT.search(linear[0][len(name) :])] or back)[-1:]

    def _query_key_value(self, name: str, attention: nn.Module) -> list[Linear]:
        linears = _lettered(name, attention)
        if sorted("".join(letters for _, letters in linears)) == ["k", "q", "v"]:
            return [linear for linear, letters in linears if letters]
        output = self._output(name, attention)
        fused = [linear for linear, _ in linears if linear not in output]
        if len(fused) != 1:
            raise UserError(_doubt("qkv", [self]))
        return fused


def _blocks(name: str, module: nn.Module, tower: nn.Module, nested: bool) -> Iterator[_Block]:
    """The blocks below a module; `nested`: which is itself within a member of a list."""
    for path, child in _children(name, module):
        owner = child if _config(child) not in (type(None), _config(tower)) else tower
        if nested and _is_attention(path, child):
            continue
        yield from _members(path, child, owner) if _is_stack(child, nested) else _blocks(path, child, owner, nested)


def _members(name: str, stack: nn.Module, tower: nn.Module) -> Iterator[_Block]:
    for index, member in enumerate(_children(name, stack)):
        if _is_stack(member[1], nested=True):
            yield from _members(*member, tower)
            continue
        block, inner = _Block(*member, index, tower), list(_blocks(*member, tower, nested=True))
        is_stage = any(one.attends for one in inner) or not (block.ffn or block.attentions)
        yield from inner if inner and is_stage else [block]


def _edited_blocks(model: nn.Module) -> list[_Block]:
    return _of_the_language_model(list(_blocks("", model, tower=model, nested=False)), model)


def _of_the_language_model(blocks: list[_Block], model: nn.Module) -> list[_Block]:
    text_config = type(getattr(getattr(model, "config", None), "text_config", None))
    useful = [block for block in blocks if block.ffn or block.attentions]
    of_text_config = [block for block in useful if _config(block.tower) is text_config is not type(None)]
    return of_text_config or [block for block in useful if _reads_text(block.tower)] or useful or blocks


def _reads_text(tower: nn.Module) -> bool:
    modalities = getattr(tower, "input_modalities", "text")
    return getattr(tower, "main_input_name", None) == "input_ids" and "text" in modalities


# --- doubts ----------------------------------------------------------------------------------------------------------


def _check(kind: str, of_block: dict[str, list[Site]], blocks: list[_Block], model: nn.Module) -> None:
    if not any(of_block.values()):
        raise UserError(_doubt(kind, blocks, f" in {type(model).__name__}"))
    edited = {_looks(block) for block in blocks if of_block[block.name]}
    if odd := [block for block in blocks if not of_block[block.name] and _looks(block) in edited]:
        raise UserError(_doubt(kind, odd, f" in {odd[0].name}, though in blocks that look the same"))


def _looks(block: _Block) -> tuple:
    return tuple((name[len(block.name) :], type(module)) for name, module in _walk(block.name, block.module))


def _doubt(kind: str, blocks: list[_Block], where: str = "") -> str:
    what = {"ffn": "the FFN's output", "attention": "attention's output projection", "qkv": "query, key and value"}
    seen: dict[str, str] = {}  # one block of each class, those with linears first
    for block in sorted(blocks, key=lambda block: not _linears(block.name, block.module)):
        shapes = [f"{n[len(block.name) + 1 :]} {a}->{b}" for n, a, b in _linears(block.name, block.module)]
        seen.setdefault(type(block.module).__name__, ", ".join(shapes[:16]) or "no linears")
    listed = "; ".join(f"{name} ({shapes})" for name, shapes in list(seen.items())[:4]) or "none"
    return (
        f"cannot tell {what[kind]}{where}. Blocks seen: {listed}. Name the modules to edit by target_modules instead"
    )


# --- the tree of modules ---------------------------------------------------------------------------------------------


def _children(name: str, module: nn.Module) -> Iterator[Named]:
    """The children under their full names, as in the plain model: without PEFT's layers and its copies of modules."""
    for key, child in module.named_children():
        child = unwrapped(child)
        if isinstance(child, BaseTunerLayer):
            child = child.get_base_layer()
        if not isinstance(child, ModulesToSaveWrapper):
            yield f"{name}.{key}" if name else key, child


def _walk(name: str, module: nn.Module, skip: Skip = lambda *named: False) -> Iterator[Named]:
    """All modules below, in order, but for those within linears and those to skip."""
    for path, child in _children(name, module):
        if not skip(path, child):
            yield path, child
            if not _widths(child):
                yield from _walk(path, child, skip)


def _linears(name: str, module: nn.Module, skip: Skip = lambda *named: False) -> list[Linear]:
    return [(path, *widths) for path, child in _walk(name, module, skip) if (widths := _widths(child))]


def _lettered(name: str, attention: nn.Module) -> list[tuple[Linear, str]]:
    """The linears of an attention that are no gates or positions, with "q", "k", "v" by their names ("" for none)."""
    found = []
    for linear in _linears(name, attention):
        inside = linear[0][len(name) :]
        if not _GATE.search(inside):
            letters = ("".join(chain.from_iterable(_QKV.findall(part))) for part in reversed(inside.split(".")))
            found.append((linear, next(filter(None, letters), "").lower()))
    return found


def _widths(module: nn.Module) -> tuple[int, int] | None:
    """What a linear of any maker reads and writes; None for any other module."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.nf
    start, end = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (start, end) if isinstance(start, int) and isinstance(end, int) else None


@cache
def _reads_weights(kind: type) -> bool:
    """Whether an attention gives its projections' weights to torch's own function, and never calls the projections
    (WavLM, `nn.MultiheadAttention`): an edit of their outputs would do nothing."""
    codes = (getattr(function, "__code__", None) for base in kind.__mro__ for function in vars(base).values())
    return any("multi_head_attention_forward" in code.co_names for code in codes if code)


def _ways_back(linears: list[Linear], width: int) -> list[tuple[str, int]]:
    """The linears that end a detour from `width` to another width, or to twice that (gate and up fused), and back:
    their names, and that width."""
    shapes = Counter((start, end) for _, start, end in linears)

    def leads_back(inner: int, end: int) -> bool:
        others = shapes - Counter([(inner, end)])
        return end == width and bool(others[end, inner] or others[end, 2 * inner])

    return [(name, start) for name, start, end in linears if leads_back(start, end)]


def shared_expert(experts: nn.Module, siblings: Iterable[Named]) -> str | None:
    """The one of the modules beside `experts` whose output their block adds to theirs, by the last part of its name:
    GraniteMoeShared's `shared_mlp`. None for a module that holds no experts or sums them all itself."""
    if not any(_says(_EXPERT, *child) for child in _children("", experts)):
        return None
    shared = (_last(name) for name, module in siblings if _last(name) == SHARED_EXPERT and _linears("", module))
    return next(shared, None)


def _config(module: nn.Module) -> type:
    return type(getattr(module, "config", None))


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _says(pattern: re.Pattern, name: str, module: nn.Module) -> bool:
    return bool(pattern.search(_last(name)) or pattern.search(type(module).__name__))


def _is_attention(name: str, module: nn.Module) -> bool:
    """By its name; or by its class, unless that is named after an attention within (`PixtralAttentionLayer`)."""
    if _NORM.search(type(module).__name__) or not _says(_ATTENTION, name, module):
        return False
    by_name = _ATTENTION.search(_last(name))
    return bool(by_name) or not any(_says(_ATTENTION, *child) for child in _children(name, module))


def _is_aside(name: str, module: nn.Module) -> bool:
    return not _is_attention(name, module) and (_says(_ASIDE, name, module) or _is_stack(module, nested=True))


def _is_no_ffn(name: str, module: nn.Module) -> bool:
    return _is_attention(name, module) or _is_aside(name, module)


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.Sequential))


def _is_stack(module: nn.Module, nested: bool) -> bool:
    """Whether this is a list of blocks: not of linears, nor, within a block, of its unlike parts."""
    members = [child for _, child in _children("", module)] if _is_list(module) else []
    alike = len(members) == 1 or len({type(member) for member in members}) < len(members)
    return bool(members) and not any(map(_widths, members)) and (alike or not nested)
