"""The scores of all tasks: of logits and labels as arrays, of tags, and of generated texts."""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import operator
import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, mean_squared_error

from redpeft.errors import RunError, UserError, first_line

logger = logging.getLogger(__name__)

METRICS = {
    "single_label_classification": ["accuracy", "f1_macro", "matthews"],
    "multi_label_classification": ["f1_micro", "f1_macro", "exact_match"],
    "regression": ["pearson", "spearman", "mse"],
    "tags": ["accuracy", "f1_macro"],
    "entities": ["f1", "precision", "recall", "accuracy", "f1_macro"],
    "texts": ["loss"],
    "rewards": ["reward"],
}
"""What may choose the best epoch, by kind of task; the first is the usual one. See also `base.LOWER_IS_BETTER`."""

IGNORED = -100
"""The label of a token that is neither learned nor scored; also what pads predictions and labels of uneven length."""


def choose_metric(asked: str | None, kind: str) -> str:
    """The metric asked for, or else the usual one for this kind of task. Raises `UserError` if the kind does not have
    it."""
    offered = METRICS[kind]
    if asked is not None and asked not in offered:
        raise UserError(f"no metric {asked!r} for this task; it has {', '.join(offered)}")
    return asked or offered[0]


def logits_of(predictions: Any) -> np.ndarray:
    """The logits in a Trainer's predictions, which may hold hidden states too. Raises `RunError` if they are not
    finite."""
    logits = np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)
    if not np.isfinite(logits).all():
        raise RunError("the model's predictions are not finite: lower the learning rate")
    return logits


def count_classes(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """The confusion matrix: how many rows of each class (first axis) were predicted as each class (second axis)."""
    matrix = np.zeros((classes, classes), dtype=int)
    np.add.at(matrix, (labels, predicted), 1)
    return matrix


def score_matrix(matrix: np.ndarray) -> dict[str, float]:
    """The scores of a confusion matrix, all 0 without rows. "f1_macro" is the mean over the classes that occur;
    "matthews" is 0 if all rows have one class, or one prediction.

    scikit-learn's functions are not used: they warn of a single class, and of many classes in few rows.
    """
    rows, true, given, right = matrix.sum(), matrix.sum(1), matrix.sum(0), matrix.diagonal()
    if not rows:
        return {"accuracy": 0.0, "f1_macro": 0.0, "matthews": 0.0}
    occur = true + given > 0
    spread = np.sqrt(float(rows**2 - (true**2).sum()) * float(rows**2 - (given**2).sum()))
    return {
        "accuracy": float(right.sum() / rows),
        "f1_macro": float((2 * right[occur] / (true + given)[occur]).mean()),
        "matthews": float((rows * right.sum() - true @ given) / spread) if spread else 0.0,
    }


def score_label_sets(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Several labels a row; a label is predicted if its logit is positive. Shape: both (rows, labels)."""
    predicted, labels = logits > 0, labels > 0.5
    return {
        "f1_micro": float(f1_score(labels, predicted, average="micro", zero_division=0)),
        "f1_macro": float(f1_score(labels, predicted, average="macro", zero_division=0)),
        "exact_match": float((labels == predicted).all(-1).mean()),
    }


def score_values(values: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Regression. The correlation with a constant prediction is 0, not NaN. Shape: both (rows,)."""
    values, labels = values.astype(np.float64), labels.astype(np.float64)
    constant = np.ptp(values) == 0 or np.ptp(labels) == 0
    return {
        "pearson": 0.0 if constant else float(pearsonr(values, labels)[0]),
        "spearman": 0.0 if constant else float(spearmanr(values, labels)[0]),
        "mse": float(mean_squared_error(labels, values)),
    }


def score_tags(predicted: list[list[str]], expected: list[list[str]], with_entities: bool) -> dict[str, float]:
    """Token classification, with a list of tags for each row: scores of the words' tags and, if asked, of the entities
    (micro average)."""
    flat_predicted, flat_expected = ([tag for row in rows for tag in row] for rows in (predicted, expected))
    names, ids = np.unique(flat_expected + flat_predicted, return_inverse=True)
    labels, given = np.split(ids, 2)
    scores = score_matrix(count_classes(labels, given, len(names)))
    del scores["matthews"]
    if not with_entities:
        return scores
    found, true = (entities(rows) for rows in (predicted, expected))
    hits = len(found & true)
    precision, recall = hits / max(len(found), 1), hits / max(len(true), 1)
    f1 = 2 * hits / max(len(found) + len(true), 1)
    return {"f1": f1, "precision": precision, "recall": recall, **scores}


def marks_entities(tags: list[str]) -> bool:
    """Whether all tags are O, B-... or I-..., and not all are O."""
    return all(re.fullmatch(r"O|[BI]-.+", tag) for tag in tags) and any(tag != "O" for tag in tags)


def entities(rows: list[list[str]]) -> set[tuple[int, int, int, str]]:
    """The entities (row, start, end, type) of BIO tags, as CoNLL's script reads them: an I- without a B- starts
    one."""
    found = set()
    for row, tags in enumerate(rows):
        start, kind = 0, None
        for index, tag in enumerate([*tags, "O"]):
            if kind is not None and tag != f"I-{kind}":
                found.add((row, start, index, kind))
                kind = None
            if kind is None and tag != "O":
                start, kind = index, tag[2:]
    return found


# --- answers that are right or wrong ---------------------------------------------------------------------------------

NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"  # also with commas between thousands


def take_answer(text: str, expected: str) -> str:
    """The answer that a text gives, where `expected` is right.

    It is what the last <answer> ... </answer> holds, or else all of the text; of that the last number if a number is
    expected, the last word if one word is, and otherwise all without white space around it. "" if there is none.
    """
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    text = tagged[-1] if tagged else text
    expected = expected.strip()
    if re.fullmatch(NUMBER, expected):
        found = [number.replace(",", "") for number in re.findall(NUMBER, text)]
    elif re.fullmatch(r"\w+", expected):
        found = re.findall(r"\w+", text)
    else:
        found = [text.strip()]
    return found[-1] if found else ""


def is_right(text: str, expected: str) -> bool:
    """Whether the answer that a text gives (`take_answer`) is the expected one: the same number, or the same words in
    upper or lower case."""
    given, expected = take_answer(text, expected), expected.strip()
    if re.fullmatch(NUMBER, expected):
        return bool(given) and float(given) == float(expected.replace(",", ""))
    return given.lower().split() == expected.lower().split()


# --- generated texts ------------------------------------------------------------------------------------------------
#
# The five scores of the E2E NLG challenge, as its official scripts compute them.
#
# BLEU                    sacrebleu's corpus BLEU of lower-case text, tokenised as mteval-v13a does
# NIST                    written here, on the same tokens
# METEOR, ROUGE-L, CIDEr  pycocoevalcap's, after its Penn Treebank tokeniser, which needs Java as METEOR does

CAPTION_SCORES = ("meteor", "rouge_l", "cider")
NO_JAVA = (
    "METEOR, ROUGE-L and CIDEr are left out, since they need Java: install a Java runtime such as OpenJDK (apt-get "
    "install default-jre-headless, brew install openjdk, conda install openjdk) and see that `java -version` answers"
)

Tokens = Sequence[str]


def require_scorers() -> None:
    """Raises `UserError` if a package that computes the scores is missing."""
    for package in ("sacrebleu", "pycocoevalcap"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"the scores of E2E need {package}: pip install redpeft[e2e]")


def has_java() -> bool:
    """Whether `java` runs. A Mac without Java has a command of that name which does not run."""
    try:
        return subprocess.run(["java", "-version"], capture_output=True).returncode == 0
    except OSError:
        return False


def score_texts(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float | None]:
    """The scores as they are published: BLEU, METEOR and ROUGE-L in percent, NIST and CIDEr as they are.

    Args:
        predictions: one text for each meaning representation.
        references: for each of them one text or more.

    Returns:
        "bleu", "nist", "meteor", "rouge_l", "cider". The last three are None without Java, and a warning says so.

    Raises:
        UserError: nothing to score, as many predictions as groups of references are not there, or a missing package.
    """
    require_scorers()
    if not predictions or len(predictions) != len(references):
        raise UserError(
            f"{len(predictions)} predictions for {len(references)} meaning representations: one is needed for each"
        )
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenise = Tokenizer13a()
    tokens = [tokenise(text.lower()).split() for text in predictions]
    reference_tokens = [[tokenise(text.lower()).split() for text in group] for group in references]
    scores: dict[str, float | None] = {
        "bleu": bleu(predictions, references),
        "nist": nist(tokens, reference_tokens),
    }
    if has_java():
        return scores | _caption_scores(predictions, references)
    logger.warning(NO_JAVA)
    return scores | dict.fromkeys(CAPTION_SCORES)


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """sacrebleu's corpus BLEU in percent, of lower-case text. `references`: for each text one or more."""
    from sacrebleu import corpus_bleu

    streams = list(zip_longest(*references))  # the first reference of each text, then the second or None, ...
    return corpus_bleu(predictions, streams, lowercase=True, tokenize="13a", force=True).score


def nist(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]], longest: int = 5) -> float:
    """NIST of a corpus (Doddington 2002), as mteval-v13a computes it.

    NIST = P * sum over n = 1 ... `longest` of
           (sum of Info(g) over the n-grams g that match) / (number of n-grams in the hypotheses)

    - Info(w1 ... wn) = log2(count(w1 ... wn-1) / count(w1 ... wn)), counted over all references; for n = 1 the
      numerator is the number of their words.
    - An n-gram of a hypothesis matches as often as it stands in that one of its references where it is most frequent.
    - P = exp(beta * ln(min(1, H / R))^2): H is the number of words of the hypotheses, R the sum over hypotheses of the
      mean length of the references, and beta = ln 0.5 / (ln 1.5)^2 makes P = 0.5 where H is two thirds of R.
    """
    counts = Counter(
        gram for group in references for words in group for n in range(1, longest + 1) for gram in _ngrams(words, n)
    )
    counts[()] = sum(len(words) for group in references for words in group)
    gained = 0.0
    for n in range(1, longest + 1):
        information, possible = 0.0, 0
        for words, group in zip(hypotheses, references, strict=True):
            found = Counter(_ngrams(words, n))
            allowed = functools.reduce(operator.or_, (Counter(_ngrams(other, n)) for other in group))
            for gram, times in (found & allowed).items():
                information += times * math.log2(counts[gram[:-1]] / counts[gram])
            possible += found.total()
        gained += information / max(possible, 1)
    length = sum(map(len, hypotheses))
    expected = sum(sum(map(len, group)) / len(group) for group in references)
    if not length or not expected:
        return 0.0
    return gained * math.exp(math.log(0.5) * (math.log(min(1.0, length / expected)) / math.log(1.5)) ** 2)


def _ngrams(words: Tokens, n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(n)), strict=False)


def _caption_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float | None]:
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    try:
        answers, expected = _penn_tokens([[text] for text in predictions]), _penn_tokens(references)
        meteor = _meteor(expected, answers)
    except (OSError, ValueError) as error:  # Java stopped early, or pycocoevalcap cannot write into its own folder
        raise RunError(f"pycocoevalcap did not compute METEOR, ROUGE-L and CIDEr: {first_line(error)}") from error
    rouge, cider = (scorer().compute_score(expected, answers)[0] for scorer in (Rouge, Cider))
    return {"meteor": 100 * float(meteor), "rouge_l": 100 * float(rouge), "cider": float(cider)}


def _penn_tokens(groups: Sequence[Sequence[str]]) -> dict[int, list[str]]:
    """Texts in the tokens of pycocoevalcap's tokeniser, which takes one text a line. METEOR separates texts by |||."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    captions = {
        index: [{"caption": " ".join(text.replace("|||", " ").split())} for text in group]
        for index, group in enumerate(groups)
    }
    tokens = PTBTokenizer().tokenize(captions)
    if [len(tokens.get(index, [])) for index in captions] != [len(group) for group in groups]:
        raise ValueError("its tokeniser, a Java program, gave back fewer texts than it got")
    return tokens


def _meteor(expected: dict[int, list[str]], answers: dict[int, list[str]]) -> float:
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    try:
        return scorer.compute_score(expected, answers)[0]
    finally:
        if scorer.lock.locked():  # it failed, and its deletion would wait for this lock
            scorer.lock.release()
