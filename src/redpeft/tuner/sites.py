"""Where to edit: finds the sites of a transformer by its structure, with no table of model names.

    ModuleList ─> block 0, block 1, ...        one block, of width d (the commonest in it):

           ┌──────────────── attention ───────────────┐         ┌─────────────── FFN ──────────────┐
    h ───> │ query, key, value ───────────> output    │ ─ + ──> │ up: d -> f ──────> down: f -> d  │ ─ + ──> h
           └────── "qkv" ──────────────── "attention" ┘         └──────────────────────── "ffn" ───┘

- "ffn": of the linears outside attention, the one that leads back to d from the widest detour, up to f. A mixture of
  experts is edited at the smallest module that holds all experts: its output is their sum.
- "attention": in each self-attention, the linear back to d that is no query, key, value, gate or position.
- "qkv": in each self-attention, the linears named after query, key and value, each of them exactly once; or the only
  linear beside the output, which holds the three fused.

Each rule is said where it acts, with a model that needs it. What no rule decides is an error that lists what was seen:
name the modules by `target_modules` then. A convolution of size 1 is no site: the last dimension of its output is not
the width.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from redpeft.errors import UserError
from redpeft.models import linear_widths, unwrapped

KINDS = ("ffn", "attention", "qkv")
RED_PLUS = "red+"
RED_PLUS_KINDS = ("ffn", "attention", "qkv")  # the paper's enhanced variant; a kind to come is no part of it

Named = tuple[str, nn.Module]  # a module under its full name
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

    Raises `UserError`, which lists the blocks and linears seen, where a kind is not found or is ambiguous.
    """
    model = unwrapped(model)
    model = unwrapped(model.get_base_model()) if isinstance(model, PeftModel) else model
    blocks = _edited_blocks(model)
    modules = dict(_walk("", model))
    found: dict[int, Site] = {}  # by module
    for kind in site_kinds(sites):
        of_block = {block.name: block.sites(kind) for block in blocks}
        if not any(of_block.values()):
            raise _ambiguity_error(kind, blocks, f" in {type(model).__name__}")
        edited = {_signature(block) for block in blocks if of_block[block.name]}
        missed = [block for block in blocks if not of_block[block.name] and _signature(block) in edited]
        if missed:
            where = f" in {missed[0].name}, though in blocks that look the same"
            raise _ambiguity_error(kind, missed, where)
        for block in blocks:
            for site in of_block[block.name]:
                found.setdefault(id(modules[site.name]), site)
    order = {name: position for position, name in enumerate(modules)}
    ordered = sorted(found.values(), key=lambda site: order[site.name])
    if layers is None:
        return ordered
    asked = [layers] if isinstance(layers, int) else list(layers)
    known = sorted({site.layer for site in ordered})
    if unknown := [layer for layer in asked if layer not in known]:
        raise UserError(f"no block to edit has the index {unknown}; those of this model have {known}")
    return [site for site in ordered if site.layer in asked]


def site_kinds(sites: str | Sequence[str]) -> list[str]:
    """The kinds of sites that `sites` of `find_sites` stands for. Raises `UserError` for unknown ones and for none."""
    asked = {sites} if isinstance(sites, str) else set(sites)
    choices = f"choose among {', '.join(KINDS)} and '{RED_PLUS}'"
    if not asked:
        raise UserError(f"sites is empty: {choices}")
    if unknown := sorted(asked - {*KINDS, RED_PLUS}):
        raise UserError(f"unknown sites {unknown}: {choices}")
    if RED_PLUS in asked:
        asked.update(RED_PLUS_KINDS)
    return [kind for kind in KINDS if kind in asked]


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


# --- the blocks of a model -------------------------------------------------------------------------------------------


def _edited_blocks(model: nn.Module) -> list[_Block]:
    """Of a model with several towers the blocks of the one that reads text (LLaVA, CLIP); both sides of an
    encoder-decoder, and those of a lone vision or speech encoder."""
    blocks = list(_blocks("", model, model, inside_block=False))
    useful = [block for block in blocks if block.ffn or block.attentions]
    text_config = type(getattr(getattr(model, "config", None), "text_config", None))
    of_text_config = [block for block in useful if _config(block.tower) is text_config is not type(None)]
    return of_text_config or [block for block in useful if block.reads_text] or useful or blocks


def _blocks(name: str, module: nn.Module, tower: nn.Module, inside_block: bool) -> Iterator[_Block]:
    """The blocks below a module: the members of a `ModuleList` or `Sequential`. `inside_block`: the module is itself
    in a block."""
    for path, child in _children(name, module):
        owner = child if _config(child) not in (type(None), _config(tower)) else tower
        if _is_stack(child, inside_block):
            yield from _members(path, child, owner)
        else:
            yield from _blocks(path, child, owner, inside_block)


def _members(name: str, stack: nn.Module, tower: nn.Module) -> Iterator[_Block]:
    """The members of a stack, or the blocks within them: a member whose own members attend is a stage of blocks (Swin)
    or a group (ALBERT). A list of unlike parts belongs to the block around it (T5's `layer`)."""
    for index, (path, member) in enumerate(_children(name, stack)):
        if _is_stack(member, inside_block=True):
            yield from _members(path, member, tower)
            continue
        block = _Block(path, member, index, tower)
        inner = list(_blocks(path, member, tower, inside_block=True))
        if inner and (any(one.attends for one in inner) or not (block.ffn or block.attentions)):
            yield from inner
        else:
            yield block


def _is_stack(module: nn.Module, inside_block: bool) -> bool:
    """Whether this is a list of blocks: not of linears, nor, within a block, of its unlike parts."""
    members = [child for _, child in _children("", module)] if _is_list(module) else []
    alike = len(members) == 1 or len({type(member) for member in members}) < len(members)
    return bool(members) and not any(map(linear_widths, members)) and (alike or not inside_block)


# --- the sites of a block --------------------------------------------------------------------------------------------

# Attention is known by the names of modules and classes, and so is what is neither attention nor FFN: state-space
# mixers, MobileBERT's bottlenecks, the adapters of X-MOD's languages.
_ATTENTION = re.compile(r"attn|attention|(^|_)att($|_)", re.I)
_CROSS_ATTENTION = re.compile(r"cross|enc_?dec|encoder_att", re.I)
_SKIPPED = re.compile(r"mamba|(^|_)ssm|bottleneck|adapter", re.I)
_EXPERT = re.compile(r"expert|moe$", re.I)
_NORM = re.compile(r"norm(\dd|gated)?$", re.I)
_NORM_AFTER_FFN = re.compile(r"post_(feed_?forward|ffn|mlp)_(layer_?)?norm$")
_QKV = re.compile(r"(?:^|_)w?(?:(qkv|qk|kv|q|k|v)|(q)uer(?:y|ies)|(k)eys?|(v)alues?)(?=_|$)", re.I)
_OUTPUT = re.compile(r"(^|[._])(o|out|output)($|[._])", re.I)
_GATE = re.compile(r"gate|position|relative|(^|[._])(pos|rel)($|[._])", re.I)

SHARED_EXPERT = "shared_mlp"  # GraniteMoeShared's name for what it adds to its experts


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
                raise _ambiguity_error(kind, [self], f": {', '.join(self.ffn)} could each be it")
            return [Site(name, kind, self.width, self.index, self._added(name)) for name in self.ffn]
        pick = self._output if kind == "attention" else self._query_key_value
        return [Site(name, kind, out, self.index) for named in self.attentions for name, _, out in pick(*named)]

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The block and all modules in it, in order."""
        return {self.name: self.module, **dict(_walk(self.name, self.module))}

    @cached_property
    def width(self) -> int:
        """The commonest width in the block: of all that its linears read and write, and of its norms."""
        votes: Counter[int] = Counter()
        for module in self.modules.values():
            weight = getattr(module, "weight", None)
            if widths := linear_widths(module):
                votes.update(widths)
            elif isinstance(weight, torch.Tensor) and weight.dim() == 1:
                votes[len(weight)] += 1
        return max(votes, key=votes.__getitem__, default=0)

    @cached_property
    def attends(self) -> bool:
        return any(_is_attention(*named) for named in self.modules.items())

    @property
    def reads_text(self) -> bool:
        modalities = getattr(self.tower, "input_modalities", "text")
        return getattr(self.tower, "main_input_name", None) == "input_ids" and "text" in modalities

    @cached_property
    def ffn(self) -> list[str]:
        """The module whose output is the FFN's; none where there is no FFN, several where it is ambiguous."""
        if _is_attention(self.name, self.module):
            return []
        outside_attention = list(_walk(self.name, self.module, _is_attention))
        experts = [name for name, module in outside_attention if _matches(_EXPERT, name, module)]
        if experts:
            return self._with_experts(experts, outside_attention)
        linears = _linears(self.name, self.module, lambda *named: _is_attention(*named) or _skip(*named))
        ways_back = _ways_back(linears, self.width)
        # The FFN makes the widest detour: MobileBERT and Gemma 3n have narrower ones beside it.
        inner = max((start for _, start in ways_back), default=0)
        back = [name for name, start in ways_back if start == inner]
        # A prediction head is a small MLP with neither attention nor norm. XLM keeps its FFNs apart from both too.
        has_norm = any(_matches(_NORM, *named) for named in outside_attention)
        if inner <= self.width and not self.attends and not has_norm:
            return []
        if inner == self.width:
            return back[-1:]  # up and down look alike
        # RWKV multiplies what leads back by what a linear beside it makes: neither is the FFN's output. A fused gate
        # and up whose f is half of d looks the same and is no such linear.
        beside = {_parent(name) for name, *widths in linears if widths == [self.width, self.width]}
        if 2 * inner != self.width and any(_parent(name) in beside for name in back):
            return []
        if len(back) > 1:
            names = list(self.modules)
            between = names[names.index(back[-2]) : names.index(back[-1])]
            if any(_is_attention(name, self.modules[name]) for name in between):
                return back[-1:]  # Conformers have half an FFN before attention and half an FFN, the site, after it
        return back

    def _with_experts(self, experts: list[str], parts: list[Named]) -> list[str]:
        """The site of a block with experts: the smallest module that holds them all."""
        around = [n for n, m in parts if not _is_list(m) and all(name.startswith(f"{n}.") for name in experts)]
        site = around[-1] if around else experts[0]
        siblings = [named for named in parts if _parent(named[0]) == _parent(site) and named[0] != site]
        # DBRX's attention is within a "norm", which is no FFN beside the experts either.
        others = [named for named in _flat(siblings) if not (_matches(_NORM, *named) or _matches(_SKIPPED, *named))]
        dense = [named[0] for named in others if _ways_back(_linears(*named), self.width)]
        if not dense or dense[0] == self._added(site):
            return [site]
        # Gemma 4 norms the sum of its experts and its dense FFN: the norm's output is the site. LongCat-Flash adds its
        # experts later than the FFN beside them, behind one more attention: their sum is nowhere.
        return [name for name, _ in siblings if _NORM_AFTER_FFN.search(name)] or [site, *dense]

    def _added(self, site: str) -> str | None:
        """The full name of the shared expert whose output is added to that of `site`."""
        parent = _parent(site)
        return f"{parent}.{SHARED_EXPERT}" if adds_shared_expert(self.modules[parent], self.modules[site]) else None

    @cached_property
    def attentions(self) -> list[Named]:
        """The self-attentions in the block, or the block itself: XLM keeps its attentions in a list of their own."""
        within = [(self.name, self.module), *_walk(self.name, self.module, _skip)]
        found = [named for named in within if _is_attention(*named)]
        topmost = [named for named in found if not any(named[0].startswith(f"{outer}.") for outer, _ in found)]
        own = [named for named in _flat(topmost) if not _matches(_CROSS_ATTENTION, *named) and _linears(*named)]
        return [(name, module) for name, module in own if not any(map(_bypasses_forward, map(type, module.modules())))]

    def _output(self, name: str, attention: nn.Module) -> list[Linear]:
        """The output projection: by its name where several linears lead back to the width."""
        back = [linear for linear, letters in _label_qkv(name, attention) if not letters and linear[2] == self.width]
        if not back:
            raise _ambiguity_error("attention", [self])
        return ([linear for linear in back if _OUTPUT.search(linear[0][len(name) :])] or back)[-1:]

    def _query_key_value(self, name: str, attention: nn.Module) -> list[Linear]:
        labelled = _label_qkv(name, attention)
        if sorted("".join(letters for _, letters in labelled)) == ["k", "q", "v"]:
            return [linear for linear, letters in labelled if letters]
        output = self._output(name, attention)
        fused = [linear for linear, _ in labelled if linear not in output]
        if len(fused) != 1:
            raise _ambiguity_error("qkv", [self])
        return fused


def _ways_back(linears: list[Linear], width: int) -> list[tuple[str, int]]:
    """The linears that end a detour from `width` to another width and back: their names, and that width. The way there
    may be twice as wide: gate and up fused (Phi-3)."""
    shapes = Counter((start, end) for _, start, end in linears)
    back = []
    for name, start, end in linears:
        others = shapes - Counter([(start, end)])
        if end == width and (others[width, start] or others[width, 2 * start]):
            back.append((name, start))
    return back


def _label_qkv(name: str, attention: nn.Module) -> list[tuple[Linear, str]]:
    """The linears of an attention that are no gates or positions, with "q", "k", "v" by their names ("" for none)."""
    labelled = []
    for linear in _linears(name, attention):
        inside = linear[0][len(name) :]
        if not _GATE.search(inside):
            letters = ("".join("".join(found) for found in _QKV.findall(part)) for part in inside.split("."))
            labelled.append((linear, next(filter(None, letters), "").lower()))
    return labelled


@cache
def _bypasses_forward(kind: type) -> bool:
    """Whether an attention gives its projections' weights to torch's own function, and never calls the projections
    (WavLM, `nn.MultiheadAttention`): an edit of their outputs would do nothing."""
    codes = (getattr(function, "__code__", None) for base in kind.__mro__ for function in vars(base).values())
    return any("multi_head_attention_forward" in code.co_names for code in codes if code)


def adds_shared_expert(parent: nn.Module, experts: nn.Module) -> bool:
    """Whether a module adds the output of its `SHARED_EXPERT` to that of another part of it, which holds experts."""
    shared = dict(_children("", parent)).get(SHARED_EXPERT)
    holds_experts = any(_matches(_EXPERT, *child) for child in _children("", experts))
    return holds_experts and shared is not None and bool(_linears("", shared))


def _matches(pattern: re.Pattern, name: str, module: nn.Module) -> bool:
    """Whether the last part of a module's name, or the name of its class, matches."""
    return bool(pattern.search(_last(name)) or pattern.search(type(module).__name__))


def _is_attention(name: str, module: nn.Module) -> bool:
    """By its name; or by its class, unless that is named after an attention within (`PixtralAttentionLayer`)."""
    if _NORM.search(type(module).__name__) or not _matches(_ATTENTION, name, module):
        return False  # a norm before or after attention may be named after it (Higgs Audio)
    by_name = _ATTENTION.search(_last(name))
    return bool(by_name) or not any(_matches(_ATTENTION, *child) for child in _children(name, module))


def _skip(name: str, module: nn.Module) -> bool:
    """Whether a part of a block is neither attention nor FFN: by its name, or as a stack of blocks of its own."""
    return not _is_attention(name, module) and (
        _matches(_SKIPPED, name, module) or _is_stack(module, inside_block=True)
    )


# --- ambiguity -------------------------------------------------------------------------------------------------------


def _signature(block: _Block) -> tuple:
    """Equal for blocks of the same modules."""
    return tuple((name[len(block.name) :], type(module)) for name, module in _walk(block.name, block.module))


def _ambiguity_error(kind: str, blocks: list[_Block], where: str = "") -> UserError:
    """The error that lists what was seen: one block of each class, those with linears first."""
    what = {"ffn": "the FFN's output", "attention": "attention's output projection", "qkv": "query, key and value"}
    seen: dict[str, str] = {}
    for block in sorted(blocks, key=lambda block: not _linears(block.name, block.module)):
        shapes = [f"{n[len(block.name) + 1 :]} {a}->{b}" for n, a, b in _linears(block.name, block.module)]
        seen.setdefault(type(block.module).__name__, ", ".join(shapes[:16]) or "no linears")
    listed = "; ".join(f"{name} ({shapes})" for name, shapes in list(seen.items())[:4]) or "none"
    return UserError(
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


def _walk(name: str, module: nn.Module, skip: Callable[[str, nn.Module], bool] | None = None) -> Iterator[Named]:
    """All modules below, in order, but for those within linears and those to skip."""
    for path, child in _children(name, module):
        if skip is None or not skip(path, child):
            yield path, child
            if not linear_widths(child):
                yield from _walk(path, child, skip)


def _linears(name: str, module: nn.Module, skip: Callable[[str, nn.Module], bool] | None = None) -> list[Linear]:
    return [(path, *widths) for path, child in _walk(name, module, skip) if (widths := linear_widths(child))]


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.Sequential))


def _flat(modules: list[Named]) -> list[Named]:
    """With the members of lists in place of the lists."""
    return [one for named in modules for one in (_children(*named) if _is_list(named[1]) else [named])]


def _config(module: nn.Module) -> type:
    return type(getattr(module, "config", None))


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _last(name: str) -> str:
    return name.rpartition(".")[2]
