"""Compositions of adapter folders: by formula, on a model, as the language says, and what is refused."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForSequenceClassification

from helpers.adapters import SITES, WIDTH, random_tensors, write_folder
from redpeft import RedConfig, cli
from redpeft.adapters import Adapter, EffectiveEdit, load_adapter, read_adapter, write_adapter
from redpeft.adapters.arithmetic import (
    compose,
    inverse,
    keep_bias,
    keep_layers,
    keep_scale,
    sequence,
    take_head,
    trim,
    weighted_sum,
)
from redpeft.errors import UserError

PRINT = {"shapes": "x", "samples": [0.5]}


@pytest.fixture
def folders(tmp_path):
    """Folders "a" and "b" of one base, whose units differ."""
    write_folder(tmp_path / "a", random_tensors(seed=1, unit=0.25), base_fingerprint=PRINT)
    write_folder(tmp_path / "b", random_tensors(seed=2, unit=4.0), base_fingerprint=PRINT)
    return tmp_path


def made(folder, expression, **options):
    """What an expression gives, read back from disk; A, B and C in it are the folders "a", "b" and "c" in `folder`."""
    expression = re.sub(r"\b[ABC]\b", lambda name: f'"{folder / name[0].lower()}"', expression)
    out = folder / f"out-{len(list(folder.iterdir()))}"
    compose(expression, out, **options)
    return read_adapter(out)


def close(adapter, expected, rtol=1e-5, atol=1e-4):
    assert adapter.edits.keys() == expected.keys()
    for site, (scale, bias) in expected.items():
        torch.testing.assert_close(adapter.edits[site].scale, scale.double(), rtol=rtol, atol=atol)
        torch.testing.assert_close(adapter.edits[site].bias, bias.double(), rtol=rtol, atol=atol)


def of(folder, name):
    return read_adapter(folder / name).edits


def test_the_language_by_formula(folders):
    a, b = of(folders, "a"), of(folders, "b")
    ones, zeros = torch.ones(WIDTH), torch.zeros(WIDTH)
    average = {s: (0.7 * a[s].scale + 0.3 * b[s].scale, 0.7 * a[s].bias + 0.3 * b[s].bias) for s in SITES}
    after = {s: (b[s].scale * a[s].scale, b[s].scale * a[s].bias + b[s].bias) for s in SITES}
    minus = {s: (2 - a[s].scale, -a[s].bias) for s in SITES}
    close(made(folders, "0.7 * A + 0.3 * B"), average)
    close(made(folders, ".3 * B+7e-1 * A"), average)
    close(made(folders, "A >> B"), after)
    close(made(folders, "-1 * A"), minus)
    close(made(folders, "scale(A)"), {s: (a[s].scale, zeros) for s in SITES})
    close(made(folders, "bias(A)"), {s: (ones, a[s].bias) for s in SITES})
    close(made(folders, "layers(A, 1)"), {SITES[1]: a[SITES[1]]})
    close(made(folders, "layers(A, 0) + layers(B, 1)"), {SITES[0]: a[SITES[0]], SITES[1]: b[SITES[1]]})
    # * binds more tightly than +, + more tightly than >>
    both = {s: (a[s].scale + b[s].scale - 1, a[s].bias + b[s].bias) for s in SITES}
    expected = {s: (a[s].scale * both[s][0], a[s].scale * both[s][1] + a[s].bias) for s in SITES}
    close(made(folders, "A + B >> A"), expected, atol=1e-3)
    half = {s: ((1 + after[s][0]) / 2, after[s][1] / 2) for s in SITES}
    close(made(folders, "0.5 * (A >> B)"), half)
    close(made(folders, "scale(A) >> bias(A)"), a)


def test_an_inverse_undoes(folders):
    identity = {site: (torch.ones(WIDTH), torch.zeros(WIDTH)) for site in SITES}
    close(made(folders, "A >> B >> inverse(A >> B)"), identity, atol=1e-4)
    close(made(folders, "inverse(1 * A) >> A"), identity, atol=1e-4)


def test_the_folder_names_what_it_is(folders):
    made_of = made(folders, "0.5 * B + 0.5 * A")
    assert made_of.units == dict.fromkeys(SITES, 4.0)
    assert made_of.config["base_fingerprint"] == PRINT
    assert (made_of.config["sites"], made_of.config["resolved"]) == ("ffn", True)
    assert (made_of.config["base_model_name_or_path"], made_of.config["revision"]) == ("some/encoder", "abc123")
    assert made_of.config["target_modules"] == SITES
    part = made(folders, "layers(A, 0)")
    assert (part.config["base_fingerprint"], part.config["sites"]) == (None, None)
    whole = made(folders, "layers(A, 0) + layers(B, 1)")
    assert (whole.config["base_fingerprint"], whole.config["sites"]) == (PRINT, "ffn")
    assert whole.units == {SITES[0]: 0.25, SITES[1]: 4.0}


def test_sites_that_peft_shortened_to_an_ending(tmp_path):
    """A list of 20 and more names."""
    sites = sorted(f"layer.{index}.output.dense" for index in range(24))
    for name in ("a", "b"):
        write_folder(tmp_path / name, random_tensors(sites), targets=["output.dense"], base_fingerprint=PRINT)
    both = made(tmp_path, "A >> B")
    assert both.config["target_modules"] == sites
    assert (both.config["base_fingerprint"], both.config["sites"]) == (PRINT, "ffn")


def test_a_site_that_one_lacks_is_the_identity_there(folders):
    write_folder(folders / "c", random_tensors(SITES[1:], seed=3, unit=9.0), targets=SITES[1:])
    a, c = of(folders, "a"), of(folders, "c")
    both = made(folders, "2 * C + 0.5 * A")
    half = ((1 + a[SITES[0]].scale) / 2, a[SITES[0]].bias / 2)
    last = 1 + 2 * (c[SITES[1]].scale - 1) + (a[SITES[1]].scale - 1) / 2, 2 * c[SITES[1]].bias + a[SITES[1]].bias / 2
    close(both, {SITES[1]: last, SITES[0]: half})
    assert both.units == {SITES[0]: 0.25, SITES[1]: 9.0}
    assert both.config["base_fingerprint"] == PRINT  # that of A, which edits the same sites
    after = made(folders, "A >> C")
    assert torch.equal(after.edits[SITES[0]].scale, a[SITES[0]].scale)


# The functions


def adapter(**edits):
    """An adapter in memory with sites "0.x", "1.x", ... from (scales, biases); the unit of the site n is n + 1."""
    edits = {
        f"{name[1:]}.x": EffectiveEdit(*(torch.tensor(part).double() for part in edit)) for name, edit in edits.items()
    }
    units = {site: float(site[0]) + 1 for site in edits}
    return Adapter("memory", {"target_modules": list(edits)}, edits, units, {})


lists = st.lists(st.floats(-64, 74, width=32), min_size=3, max_size=3)
adapters = st.dictionaries(st.sampled_from(["n0", "n1", "n2"]), st.tuples(lists, lists), min_size=1).map(
    lambda edits: adapter(**edits)
)


def same(left, right):
    for site in left.edits.keys() | right.edits.keys():
        identity = EffectiveEdit(torch.ones(3).double(), torch.zeros(3).double())
        pair = left.edits.get(site, identity), right.edits.get(site, identity)
        torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(a=adapters, b=adapters, c=adapters, w=st.floats(-2, 2))
def test_algebra_of_adapters_with_different_sites(a, b, c, w):
    same(sequence([sequence([a, b]), c]), sequence([a, sequence([b, c])]))
    same(sequence([a, b, c]), sequence([a, sequence([b, c])]))
    same(weighted_sum([weighted_sum([a, b], [1, w]), c], [1, 1]), weighted_sum([c, b, a], [1, w, 1]))
    same(weighted_sum([a, a], [w, 1 - w]), a)
    same(sequence([keep_scale(a), keep_bias(a)]), a)
    same(weighted_sum([keep_scale(a), keep_bias(a)], [1, 1]), a)
    assert (
        sequence([a, b]).edits.keys() == weighted_sum([b, a], [1, 1]).edits.keys() == a.edits.keys() | b.edits.keys()
    )


@settings(max_examples=40, deadline=None)
@given(a=adapters)
def test_inverses(a):
    zero = [site for site, edit in a.edits.items() if (edit.scale == 0).any()]
    if zero:
        with pytest.raises(
            UserError, match=f"memory has no inverse: a scale is 0 at {', '.join(zero)}\\. Its negation"
        ):
            inverse(a)
    elif all(edit.scale.abs().min() > 1e-3 for edit in a.edits.values()):
        same(sequence([a, inverse(a)]), adapter(n0=([1.0] * 3, [0.0] * 3)))


def test_trimming_by_hand():
    # sizes of the scales 3 0.1 | 0.5 4, of the biases in units 9 2 | 6 0.5
    whole = adapter(n0=([4, 0.9], [-9, 2]), n1=([0.5, -3], [12, 1]))
    half = trim(whole, 0.5)
    assert half.edits["0.x"].scale.tolist() == [4, 1]
    assert half.edits["1.x"].scale.tolist() == [1, -3]
    assert half.edits["0.x"].bias.tolist() == [-9, 0]
    assert half.edits["1.x"].bias.tolist() == [12, 0]
    quarter = trim(whole, 0.25)
    assert quarter.edits["0.x"].scale.tolist() == [4, 1]
    assert quarter.edits["1.x"].scale.tolist() == [0.5, -3]
    assert quarter.edits["0.x"].bias.tolist() == [-9, 2]
    assert quarter.edits["1.x"].bias.tolist() == [12, 0]
    same(trim(whole, 0), whole)
    assert all(edit.bias.abs().max() == 0 and (edit.scale == 1).all() for edit in trim(whole, 1).edits.values())
    with pytest.raises(UserError, match=r"the share to trim is from 0 to 1, not 1.5"):
        trim(whole, 1.5)


@settings(max_examples=30, deadline=None)
@given(a=adapters, share=st.floats(0, 1))
def test_trimming_keeps_the_largest(a, share):
    cut = trim(a, share)
    for kept, all_, rest in [
        *((cut.edits[s].bias / a.units[s], a.edits[s].bias / a.units[s], 0.0) for s in a.edits),
        *((cut.edits[s].scale, a.edits[s].scale, 1.0) for s in a.edits),
    ]:
        assert torch.equal(kept[kept != rest], all_[kept != rest])
    count = sum((edit.scale != 1).sum().item() for edit in cut.edits.values())
    assert count <= 3 * len(a.edits) - round(share * 3 * len(a.edits))


def test_layers_are_the_first_numbers_in_the_names():
    names = ["encoder.block.0.layer.1.wo", "encoder.block.11.layer.1.wo", "mt5.block.1.layer.2.wo", "pooler", "3"]
    edit = EffectiveEdit(torch.full((2,), 3.0), torch.ones(2))
    some = Adapter("memory", {}, dict.fromkeys(names, edit), dict.fromkeys(names, 1.0), {})
    assert list(keep_layers(some, [1, 11]).edits) == [names[1], names[2]]
    assert list(keep_layers(some, [3]).edits) == ["3"]
    with pytest.raises(UserError, match="memory edits nothing in layer 2; its layers are 0, 1, 3, 11"):
        keep_layers(some, range(3))
    flat = Adapter("memory", {}, {"pooler": edit}, {"pooler": 1.0}, {})
    with pytest.raises(UserError, match="its layers are none, as no site's name has a number"):
        keep_layers(flat, [0])


# On a model


def edited(base, folders, seed=0, **options):
    """Adapters of a model with random edits and units that differ, saved in `folders`."""
    for number, folder in enumerate(folders, start=seed):
        model = base()
        torch.manual_seed(number)
        model = get_peft_model(model, RedConfig(init_weights=False, unit=0.5 + number, **options))
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.data.add_(torch.randn_like(parameter))
        model.save_pretrained(folder)


def output(model, *folders):
    for number, folder in enumerate(folders):
        if number == 0:
            model = PeftModel.from_pretrained(model, folder, adapter_name="0")
        else:
            model.load_adapter(folder, adapter_name=str(number))
    model.base_model.set_adapter([str(number) for number, _ in enumerate(folders)])
    with torch.no_grad():
        return next(iter(model.eval()(input_ids=torch.arange(5, 15)[None]).values()))


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_composition_on_its_base_is_the_adapters_one_after_another(
    tmp_path, kind, tiny_encoder_folder, tiny_decoder_folder
):
    source = {"encoder": tiny_encoder_folder, "decoder": tiny_decoder_folder}[kind]

    def base():
        return AutoModel.from_pretrained(source)

    edited(base, [tmp_path / "a"], sites="red+")
    edited(base, [tmp_path / "b"], seed=5)
    expected = output(base(), tmp_path / "a", tmp_path / "b")
    composed = made(tmp_path, "A >> B")
    torch.testing.assert_close(output(base(), composed.folder), expected, rtol=1e-4, atol=1e-4)
    turned = output(base(), made(tmp_path, "B >> A").folder)
    assert (turned - expected).abs().max() > 0.01
    load_adapter(base(), composed.folder)  # refuses another base
    undone = made(tmp_path, "A >> B >> inverse(B)")
    torch.testing.assert_close(output(base(), undone.folder), output(base(), tmp_path / "a"), rtol=1e-3, atol=1e-3)


def test_memory_and_disk_agree(tmp_path, tiny_decoder_folder):
    def base():
        return AutoModel.from_pretrained(tiny_decoder_folder)

    edited(base, [tmp_path / "a", tmp_path / "b"])
    model = PeftModel.from_pretrained(base(), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", adapter_name="b")
    for kind, expression in {"linear": "0.7 * A + -0.2 * B", "sequence": "0.7 * A >> -0.2 * B"}.items():
        model.add_weighted_adapter(["a", "b"], [0.7, -0.2], kind, combination_type=kind)
        model.save_pretrained(tmp_path / "memory", selected_adapters=[kind])
        memory, disk = read_adapter(tmp_path / "memory" / kind), made(tmp_path, expression)
        close(memory, {site: tuple(edit) for site, edit in disk.edits.items()}, atol=1e-5)
        assert memory.units == disk.units
        fields = ("base_fingerprint", "sites", "resolved", "use_scale", "use_bias", "task_type")
        assert [memory.config[name] for name in fields] == [disk.config[name] for name in fields]
        assert set(memory.config["target_modules"]) == set(disk.config["target_modules"])


def test_heads(tmp_path, tiny_encoder_folder):
    def base():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(tiny_encoder_folder, num_labels=3)

    edited(base, [tmp_path / "a", tmp_path / "b"], task_type="SEQ_CLS")
    edited(base, [tmp_path / "c"], seed=2)
    heads = {name: read_adapter(tmp_path / name).head for name in "abc"}
    assert heads["a"].keys() == heads["b"].keys() == {"classifier.weight", "classifier.bias"}
    assert not heads["c"]
    average = made(tmp_path, "0.25 * A + 0.75 * B")
    for key, tensor in average.head.items():
        torch.testing.assert_close(tensor, 0.25 * heads["a"][key] + 0.75 * heads["b"][key])
    assert output(base(), average.folder).shape == (1, 3)
    alone = made(tmp_path, "C >> 0.5 * A")
    assert torch.equal(alone.head["classifier.weight"], heads["a"]["classifier.weight"])
    assert (alone.config["task_type"], "classifier" in alone.config["modules_to_save"]) == ("SEQ_CLS", True)
    both = made(tmp_path, "A >> B", head=tmp_path / "b")
    assert torch.equal(both.head["classifier.weight"], heads["b"]["classifier.weight"])
    with pytest.raises(UserError, match="a and .*b bring different heads .* cannot act one after another; say whose"):
        made(tmp_path, "A >> B")
    with pytest.raises(UserError, match="bring different heads .* their weights sum to 2, not to 1"):
        made(tmp_path, "A + B")
    assert "classifier.weight" in made(tmp_path, "A + 0.1 * layers(A, 0)").head  # one head, twice


def test_it_is_said_whose_head_results(tmp_path, tiny_encoder_folder, capsys):
    def base():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(tiny_encoder_folder, num_labels=3)

    runs = [tmp_path / "a", tmp_path / "b"]
    edited(base, [run / "adapter" for run in runs], task_type="SEQ_CLS")
    edited(base, [tmp_path / "c"], seed=2)

    def label(run, *labels):
        (run / "recipe.yaml").touch()
        (run / "task.json").write_text(json.dumps({"label_names": labels}))

    def log_main(expression, *options):
        expression = re.sub(r"\b[ABC]\b", lambda name: f'"{tmp_path / name[0].lower()}"', expression)
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        with contextlib.suppress(SystemExit):
            cli.main(["compose", expression, "--out", str(out), *map(str, options)])
        printed = capsys.readouterr()
        return " ".join((printed.out + printed.err).split())

    for run in runs:
        label(run, "x", "y", "z")
    assert f"Head (modules_to_save): {runs[0]} Adapter" in log_main("C >> 0.5 * A")
    average = f"Head (modules_to_save): the average of {runs[0]} and {runs[1]}, by their weights"
    assert average in log_main("0.25 * A + 0.75 * B")
    assert "Head" not in log_main("2 * C")
    label(runs[1], "x", "z", "y")
    for expression in ("0.25 * A + 0.75 * B", "0.5 * A + 0.5 * (B - C)"):
        assert f"{runs[0]} and {runs[1]} bring heads (modules_to_save) of different labels" in log_main(expression)
    assert f"Head (modules_to_save): {runs[1]} Adapter" in log_main("0.25 * A + 0.75 * B", "--head", runs[1])


@pytest.mark.parametrize("model", ["RoBERTa/RoBERTa_base/checkpoint/mnli", "GPT-2/gpt2_medium/checkpoint"])
def test_released_edits(tmp_path, model):
    """Trained edits of the paper's authors: scales from -7.6 to 17, some within 2e-4 of 0."""
    released = Path(__file__).parents[2] / ".." / "shared" / "official_red" / model / "delta_vector.pth"
    if not released.is_file():
        pytest.skip("no ../shared/official_red beside the repository")
    tensors = torch.load(released, weights_only=True, map_location="cpu")
    edits = {}
    for key in tensors:
        if key.endswith(".activation_scaling"):
            site = key.removesuffix(".delta_vector.activation_scaling")
            bias = tensors[f"{site}.delta_vector.activation_bias"]
            edits[site] = EffectiveEdit(tensors[key].flatten(), bias.flatten())
    write_adapter(Adapter(tmp_path / "a", {"scale_origin": 0}, edits, dict.fromkeys(edits, 1.0), {}))
    width = next(iter(edits.values())).scale.numel()
    identity = dict.fromkeys(edits, (torch.ones(width), torch.zeros(width)))
    close(made(tmp_path, "A >> inverse(A)"), identity, rtol=0, atol=1e-7)
    close(made(tmp_path, "0.25 * A + 0.75 * A"), edits, rtol=0, atol=0)
    twice = {site: (edit.scale.double() ** 2, (edit.scale.double() + 1) * edit.bias) for site, edit in edits.items()}
    close(made(tmp_path, "A >> A"), twice, rtol=1e-6, atol=1e-6)
    trimmed = made(tmp_path, "trim(A, 0.8)")
    changed = torch.cat([edit.scale != 1 for edit in trimmed.edits.values()])
    assert changed.float().mean().item() == pytest.approx(0.2, abs=1e-4)


# What is refused


@pytest.fixture
def redpeft(capsys, monkeypatch, folders):
    """Run `redpeft compose` in the folder of "a" and "b": (exit code, standard output, standard error)."""
    monkeypatch.chdir(folders)

    def run(*arguments):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["compose", *map(str, arguments)])
        return exit_.value.code, *capsys.readouterr()

    return run


def test_the_command(redpeft, folders):
    code, out, _ = redpeft("0.5 * 'a' + 0.5 * 'b'", "--out", "both", "--json")
    assert code == 0
    data = json.loads(out)
    assert (data["adapter"], data["expression"], data["base_fingerprint"]) == ("both", "0.5 * 'a' + 0.5 * 'b'", PRINT)
    assert [row["site"] for row in data["sites"]] == SITES
    assert data["sites"][0]["unit"] == 0.25
    (folders / "run with blanks + signs").mkdir()
    (folders / "a").rename(folders / "run with blanks + signs" / "adapter")
    code, out, _ = redpeft("layers('run with blanks + signs', 0)", "--out", "part")
    assert code == 0
    assert "No fingerprint of the base model: none was made for exactly these sites." in out
    assert "Adapter: part" in out
    assert list(of(folders, "part")) == SITES[:1]


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "cannot read '' at character 1: invalid syntax"),
        ("'a' +", "at character 6: invalid syntax; an expression is written as 0.7 * "),
        ("a:0.7 + b:0.3", "at character 2: invalid syntax; an expression is written as 0.7 * "),
        ("'a' + + 'b'", "at character 7: expected a folder in quotes, a sum, a product or a function, as 0.7 * "),
        ("'a' 'b'", "ab: no such adapter folder"),
        ("'a')", "at character 4: unmatched ')'"),
        ("('a'", "at character 1: '(' was never closed"),
        ("'a' > 'b'", "at character 1: expected a folder in quotes"),
        ("a", "at character 1: expected a folder in quotes, a sum, a product or a function, as 0.7 * "),
        ("0.5 * runs/a", "at character 1: expected a folder in quotes"),
        ("'a' + 'b", "at character 7: unterminated string literal"),
        ("0.5", "at character 1: expected a folder in quotes"),
        ("'a' * 0.5", "at character 1: expected a number, as 0.7, not 'a'"),
        ("('a' + 'b') * 0.5", "at character 2: expected a number, as 0.7, not 'a' + 'b'"),
        ("much * 'a'", "at character 1: expected a number, as 0.7, not much"),
        ("'a' >> reverse('b')", "8: there is no function reverse; there are inverse, scale, bias, layers, trim"),
        ("scale('a', 1)", "at character 1: write scale(a)"),
        ("trim('a', share=0.8)", "at character 1: write trim(a, 0.8)"),
        ("layers('a')", "at character 1: write layers(a, 0-5, 11)"),
        ("layers('a', x)", "at character 13: expected a layer, as 11, or a range of layers, as 0-5, not x"),
        ("layers('a', 0-99999999999)", "at character 13: expected a layer, as 11, or a range of layers"),
        ("layers('a', 0-2)", "a edits nothing in layer 2; its layers are 0, 1"),
        ("trim('a', 1.2)", "the share to trim is from 0 to 1, not 1.2"),
        ("trim('a', '80%')", "at character 11: expected a number, as 0.7, not '80%'"),
        ("__import__('os').system('true')", "at character 1: expected a folder in quotes"),
        pytest.param("(" * 900 + "'a'" + ")" * 900, "too many nested parentheses", id="parentheses"),
        pytest.param(f"1{'0' * 400} * 'a'", "nested too deeply, or a number in it is too large", id="large"),
        ("'nowhere'", "nowhere: no such adapter folder"),
        ("1e39 * 'a'", f"out: {SITES[0]}: scale has values that are not finite (NaN, or too large for fp32)"),
    ],
)
def test_what_cannot_be_made(redpeft, folders, expression, message):
    code, out, err = redpeft(expression, "--out", "out")
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in folders.iterdir()) == ["a", "b"]


def test_a_folder_in_use_is_not_overwritten(redpeft):
    code, _, err = redpeft("'a' + 'b'", "--out", "b")
    assert code == 2
    assert "b exists already and is not an empty folder: choose another, or remove it" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensors": random_tensors(width=48)}, f"the output of {SITES[0]} has width 32 in one and 48 in the other"),
        ({"base_fingerprint": PRINT | {"samples": [0.7]}}, "the weights differ (1 of 1 sampled values)"),
        ({"base_model_name_or_path": "some/chat"}, "one names some/encoder, the other some/chat, and their finger"),
        (
            {
                "tensors": random_tensors(SITES[:1]),
                "targets": SITES[:1],
                "base_fingerprint": PRINT,
                "base_model_name_or_path": "some/chat",
            },
            "one names some/encoder, the other some/chat",
        ),
    ],
    ids=["width", "fingerprint", "name", "name where the sites differ"],
)
def test_adapters_of_different_bases_are_refused(folders, options, message):
    write_folder(folders / "c", options.pop("tensors", random_tensors()), **options)
    for combine in (lambda *both: sequence(both), lambda *both: weighted_sum(both, [1, 1]), take_head):
        with pytest.raises(UserError) as error:
            combine(read_adapter(folders / "a"), read_adapter(folders / "c"))
        assert f"{folders / 'a'} and {folders / 'c'} are for different base models: " in str(error.value)
        assert message in str(error.value)
    with pytest.raises(UserError, match="are for different base models"):
        made(folders, "A + layers(C, 0)")
    with pytest.raises(UserError, match="are for different base models"):
        made(folders, "A", head=folders / "c")


def test_fingerprints_decide_over_names(folders):
    write_folder(folders / "c", random_tensors(), base_model_name_or_path="a/copy", base_fingerprint=PRINT)
    assert made(folders, "A + layers(C, 0) >> C").config["base_model_name_or_path"] == "some/encoder"
    unnamed = write_folder(folders / "b2", random_tensors(), base_model_name_or_path=None)
    weighted_sum([read_adapter(folders / "a"), read_adapter(unnamed)], [1, 1])
