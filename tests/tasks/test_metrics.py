from __future__ import annotations

import importlib.util
import math
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import matthews_corrcoef

from redpeft.errors import RunError, UserError
from redpeft.tasks import metrics
from redpeft.tasks.e2e import score_files
from redpeft.tasks.metrics import NO_JAVA, has_java, nist, score_texts


def test_scores_of_classes():
    matrix = metrics.count_classes(np.array([0, 1, 1, 2, 2]), np.array([0, 0, 1, 2, 1]), 3)
    assert matrix.tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    scores = metrics.score_matrix(matrix)
    assert scores["accuracy"] == pytest.approx(0.6)
    assert scores["f1_macro"] == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)
    # Gorodkin's formula by hand: 3 of 5 right; predicted 2, 2, 1 of each class, true 1, 2, 2
    assert scores["matthews"] == pytest.approx((3 * 5 - (2 + 4 + 2)) / np.sqrt((25 - 9) * (25 - 9)))


@pytest.mark.parametrize(
    ("text", "expected", "right"),
    [
        ("15 - 43 - 75 = -103.", "-103", True),
        ("The answer is 1,204", "1204", True),
        ("The answer is 3, or 4", "3", False),
        ("I do not know", "3", False),
        ("The word is: Cimho.", "cimho", True),
        ("cimho (backward)", "cimho", False),
        ("", "cimho", False),
        ("2 + 3: <answer>5</answer>, not 6", "5", True),
        ("1234.0", "1,234", True),
        ("so x = -3", "3", False),
        ("3", "3.14", False),
        ("<answer>4</answer> or <answer> 5 </answer>", "5", True),
        ("<answer>green\ntea</answer>", "green tea", True),
        ("<answer></answer> 5", "5", False),
        ("...", "cimho", False),
        ("green Tea", "Green  tea", True),
        ("green tea, please", "green tea", False),
        ("BLUE,red", "blue,red", True),
        ("red", "blue,red", False),
        ("1,2,3", "1,2,3", True),
        ("12,3", "1,2,3", False),
        ("1,2,3", "3", True),
    ],
)
def test_an_answer_is_its_last_number_its_last_word_or_the_whole_text(text, expected, right):
    assert metrics.is_right(text, expected) is right


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("labels", "predicted", "f1", "matthews"),
    [
        ([1, 1, 1], [1, 1, 1], 1.0, 0.0),  # a single class
        ([0, 0, 0], [1, 1, 1], 0.0, 0.0),
        (range(30), range(30), 1.0, 1.0),  # more classes than half of the rows
        ([0, 0, 1, 29, 7] * 5, [0, 1, 1, 29, 8] * 5, (4 / 3 + 1) / 5, None),
    ],
)
def test_scores_of_odd_splits_are_scikit_learns_without_its_warnings(labels, predicted, f1, matthews):
    labels, predicted = np.array(labels), np.array(predicted)
    scores = metrics.score_matrix(metrics.count_classes(labels, predicted, 30))
    assert scores["accuracy"] == pytest.approx((labels == predicted).mean())
    assert scores["f1_macro"] == pytest.approx(f1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = matthews_corrcoef(labels, predicted)
    assert scores["matthews"] == pytest.approx(expected if matthews is None else matthews)


def test_scores_of_label_sets():
    logits = np.array([[2.0, -1.0], [3.0, 1.0], [-1.0, -2.0]])
    labels = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    scores = metrics.score_label_sets(logits, labels)
    assert scores["f1_micro"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert scores["f1_macro"] == pytest.approx(0.5)
    assert scores["exact_match"] == pytest.approx(1 / 3)


def test_scores_of_values():
    scores = metrics.score_values(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 6.0]))
    assert scores["pearson"] == pytest.approx(5 / np.sqrt(2 * 14))
    assert scores["spearman"] == pytest.approx(1.0)
    assert scores["mse"] == pytest.approx(3.0)


@pytest.mark.parametrize(("values", "labels"), [([2.0, 2.0], [1.0, 4.0]), ([1.0, 4.0], [2.0, 2.0])])
def test_a_constant_correlates_with_nothing(values, labels):
    scores = metrics.score_values(np.array(values), np.array(labels))
    assert scores == {"pearson": 0.0, "spearman": 0.0, "mse": 2.5}


def test_entities():
    assert metrics.entities([["B-A", "I-A", "O", "B-A", "B-A"], ["I-B", "I-A", "I-A"]]) == {
        (0, 0, 2, "A"),
        (0, 3, 4, "A"),
        (0, 4, 5, "A"),
        (1, 0, 1, "B"),
        (1, 1, 3, "A"),
    }


def test_scores_of_entities():
    expected = [["B-A", "I-A", "O"], ["B-B", "O", "B-A"]]
    predicted = [["B-A", "O", "O"], ["B-B", "O", "B-A"]]
    scores = metrics.score_tags(predicted, expected, with_entities=True)
    assert scores["precision"] == scores["recall"] == scores["f1"] == pytest.approx(2 / 3)
    assert scores["accuracy"] == pytest.approx(5 / 6)
    missed = metrics.score_tags([["O", "O", "O"], ["B-B", "O", "O"]], expected, with_entities=True)
    assert missed["precision"] == 1.0
    assert missed["recall"] == pytest.approx(1 / 3)
    assert missed["f1"] == pytest.approx(0.5)


def test_tags_that_mark_no_entities():
    assert [metrics.marks_entities(tags) for tags in (["O", "B-x"], ["O"], ["NOUN", "O"], ["B-x", "E-x"])] == [
        True,
        False,
        False,
        False,
    ]
    scores = metrics.score_tags([["NOUN", "VERB"]], [["NOUN", "NOUN"]], with_entities=False)
    assert scores == {"accuracy": 0.5, "f1_macro": pytest.approx(1 / 3)}
    assert metrics.score_tags([[]], [[]], with_entities=False) == {"accuracy": 0.0, "f1_macro": 0.0}


def test_entity_scores_of_rows_without_entities():
    assert metrics.score_tags([["O", "O"]], [["O", "O"]], with_entities=True)["f1"] == 0.0


def test_predictions_that_are_not_finite():
    with pytest.raises(RunError, match="not finite: lower the learning rate"):
        metrics.logits_of(np.array([[0.0, np.nan]]))
    assert metrics.logits_of((np.ones((1, 2)), "hidden states")).shape == (1, 2)


def test_choice_of_a_metric():
    assert metrics.choose_metric(None, "tags") == "accuracy"
    assert metrics.choose_metric("f1_macro", "tags") == "f1_macro"
    with pytest.raises(UserError, match="no metric 'c' for this task; it has accuracy, f1_macro"):
        metrics.choose_metric("c", "tags")


# --- generated texts ------------------------------------------------------------------------------------------------

needs_java = pytest.mark.skipif(not has_java(), reason="no Java here, which METEOR, ROUGE-L and CIDEr need")
PREDICTIONS = ["Zizzi is a cheap pub near the river.", "There is a family friendly place called Cotto."]
REFERENCES = [
    ["Zizzi is a cheap pub by the river.", "Near the river there is a pub, Zizzi."],
    ["Cotto is a family friendly place.", "A family friendly place is Cotto.", "Cotto welcomes families."],
]


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setattr(metrics, "has_java", lambda: False)


def naive_nist(hypotheses, references, longest=5):
    """By the words of the definition alone: lists, counted one n-gram at a time."""
    grams = lambda words, n: [words[at : at + n] for at in range(len(words) - n + 1)]  # noqa: E731
    everything = [words for group in references for words in group]
    total = 0.0
    for n in range(1, longest + 1):
        seen = [gram for words in everything for gram in grams(words, n)]
        shorter = [gram for words in everything for gram in grams(words, n - 1)] if n > 1 else []
        gained, made = 0.0, 0
        for words, group in zip(hypotheses, references, strict=True):
            mine = grams(words, n)
            made += len(mine)
            for index, gram in enumerate(mine):
                allowed = max(grams(other, n).count(gram) for other in group)
                if mine[:index].count(gram) < allowed:
                    before = shorter.count(gram[:-1]) if n > 1 else sum(map(len, everything))
                    gained += math.log2(before / seen.count(gram))
        total += gained / made if made else 0.0
    length, expected = sum(map(len, hypotheses)), sum(sum(map(len, g)) / len(g) for g in references)
    if length == 0:
        return 0.0
    beta = math.log(0.5) / math.log(1.5) ** 2
    return total * math.exp(beta * math.log(min(1, length / expected)) ** 2)


WORDS = st.lists(st.sampled_from("abc"), max_size=7)
SEGMENTS = st.lists(st.tuples(WORDS, st.lists(WORDS.filter(bool), min_size=1, max_size=3)), min_size=1, max_size=4)


@given(SEGMENTS, st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_nist_is_its_definition(segments, longest):
    hypotheses, references = zip(*segments, strict=True)
    expected = naive_nist(hypotheses, references, longest)
    assert nist(hypotheses, references, longest) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert nist(hypotheses[::-1], references[::-1], longest) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    ("hypotheses", "references", "expected"),
    [
        # both words: log2(2 / 1); "a b" follows from "a"
        (["a b"], [["a b"]], 1.0),
        # the same for half the length: ln(1/2) / ln(3/2) = -1.7095, squared 2.9224, 0.5 ** 2.9224
        (["a"], [["a b"]], 0.131905),
        # 5 words: log2(5 / 1) for "the", log2(5 / 2) for "cat", the mean of the two is 1.82193; "the cat" adds
        # nothing; the lengths are 2 and 2.5: 0.5 ** ((ln 0.8 / ln 1.5) ** 2) = 0.810636
        (["the cat"], [["the cat sat", "a cat"]], 1.476921),
        # "the" three times, and at most once in a reference: log2(3 / 1) / 3; "the the" is in none
        (["the the the"], [["the cat sat"]], 0.528321),
        # two texts of four words: "a" log2(4 / 2), "b" and "c" log2(4 / 1); after "a", each is log2(2 / 1)
        (["a b", "a c"], [["a b"], ["a c"]], (1 + 2 + 1 + 2) / 4 + (1 + 1) / 2),
        (["d"], [["a b"]], 0.0),
        ([""], [["a b"]], 0.0),
    ],
)
def test_nist_by_hand(hypotheses, references, expected):
    tokens = [text.split() for text in hypotheses], [[text.split() for text in group] for group in references]
    assert nist(*tokens) == pytest.approx(expected, abs=2e-6)
    assert naive_nist(*tokens) == pytest.approx(expected, abs=2e-6)


def test_nist_counts_five_words_at_most():
    """The sixth word of each text is what a sixth order would be paid for: one bit, as "f" or "g" may follow."""
    texts = [[*"abcdef"], [*"abcdeg"]]
    groups = [[text] for text in texts]
    assert nist(texts, groups) == nist(texts, groups, 5) == pytest.approx(nist(texts, groups, 6) - 1)


def test_bleu_and_nist_without_java(no_java, caplog):
    scores = score_texts(PREDICTIONS, REFERENCES)
    assert list(scores) == ["bleu", "nist", "meteor", "rouge_l", "cider"]
    assert [scores[name] for name in ("meteor", "rouge_l", "cider")] == [None] * 3
    assert 0 < scores["bleu"] < 100
    assert caplog.messages == [NO_JAVA]
    assert "\n" not in NO_JAVA
    upper = score_texts([text.upper() for text in PREDICTIONS], [[text.upper() for text in g] for g in REFERENCES])
    assert upper == scores  # lower case
    firsts = score_texts([group[-1] for group in REFERENCES], REFERENCES)
    assert firsts["bleu"] == pytest.approx(100)  # a match with any of the references, however many there are
    spaced = score_texts(["Zizzi is a cheap pub near the river .", PREDICTIONS[1]], REFERENCES)
    assert spaced == scores  # 13a: punctuation is a token


def test_java_is_found_by_running_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not has_java()
    stub = tmp_path / "java"
    stub.write_text(f"#!{sys.executable}\nraise SystemExit(1)\n")
    stub.chmod(0o755)
    assert not has_java()  # a Mac's, without Java
    stub.write_text(f"#!{sys.executable}\n")
    assert has_java()


@pytest.mark.parametrize("missing", ["sacrebleu", "pycocoevalcap"])
def test_a_missing_package_is_named(monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(UserError) as caught:
        score_texts(PREDICTIONS, REFERENCES)
    assert str(caught.value) == f"the scores of E2E need {missing}: pip install redpeft[e2e]"


@pytest.mark.parametrize(("predictions", "references"), [([], []), (PREDICTIONS, REFERENCES[:1]), ([], REFERENCES)])
def test_one_prediction_for_each(predictions, references):
    with pytest.raises(UserError, match=f"^{len(predictions)} predictions for {len(references)} meaning representat"):
        score_texts(predictions, references)


@needs_java
def test_texts_that_could_upset_the_java_programs():
    """Their input is one text a line, and METEOR's texts are separated by a sign."""
    whole = [["", *REFERENCES[1], "Café Zizzi, naïve “€5” 寿司"], REFERENCES[0]]
    broken = [[text.replace(" ", "\u2028").replace("a\u2028", "a\r\n ||| \n") for text in group] for group in whole]
    tokens = metrics._penn_tokens(whole)
    assert metrics._penn_tokens(broken) == tokens
    assert [len(group) for group in tokens.values()] == [5, 2]
    assert tokens[0][0] == ""
    scores = score_texts(
        [*PREDICTIONS, "", "...", "Café “€5” 寿司 |||"], [*REFERENCES, *REFERENCES, ["Café ||| Cotto."]]
    )
    assert all(0 < value < 100 for value in scores.values())


JAVA_THAT = {
    "ends before it is done": "raise SystemExit('-version' not in sys.argv)",
    "loses texts": "print('one line') if '-cp' in sys.argv else None",
    "tokenises and then ends": "print('1\\n2\\n3\\n4\\n5') if '-cp' in sys.argv else None",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("behaviour", JAVA_THAT)
def test_a_failure_of_java_is_one_line(tmp_path, monkeypatch, behaviour):
    stub = tmp_path / "java"
    stub.write_text(f"#!{sys.executable}\nimport sys\n{JAVA_THAT[behaviour]}\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match="^pycocoevalcap did not compute METEOR, ROUGE-L and CIDEr: ") as caught:
        score_texts(PREDICTIONS, REFERENCES)
    assert "\n" not in str(caught.value)


def test_a_folder_that_pycocoevalcap_may_not_write_into(monkeypatch):
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def fail(*_):
        raise PermissionError(13, "Permission denied", "tmp")

    monkeypatch.setattr(metrics, "has_java", lambda: True)
    monkeypatch.setattr(PTBTokenizer, "tokenize", fail)
    with pytest.raises(RunError, match="CIDEr: .*Permission denied"):
        score_texts(PREDICTIONS, REFERENCES)


PUBLISHED = {"bleu": 65.00, "nist": 8.393, "meteor": 45.03, "rouge_l": 67.61, "cider": 2.233}


def official(shared_data, *names):
    folder = shared_data.parent / "official_red" / "GPT-2" / "gpt2_medium" / "generation"
    if not folder.is_dir():
        pytest.skip("no ../shared/official_red beside the repository")
    return [folder / name for name in names]


def test_bleu_and_nist_of_the_released_generations(shared_data, no_java):
    scores = score_files(*official(shared_data, "label.txt", "pred.txt"))
    assert scores["bleu"] == pytest.approx(PUBLISHED["bleu"], abs=0.005)
    assert scores["nist"] == pytest.approx(PUBLISHED["nist"], abs=0.0005)


@needs_java
def test_all_scores_of_the_released_generations(shared_data):
    scores = score_files(*official(shared_data, "label.txt", "pred.txt"))
    digits = {"bleu": 0.005, "nist": 0.0005, "meteor": 0.005, "rouge_l": 0.005, "cider": 0.0005}
    for name, value in PUBLISHED.items():
        assert scores[name] == pytest.approx(value, abs=digits[name]), name
