"""The five scores of the E2E NLG challenge, as its official scripts compute them.

BLEU                    sacrebleu's corpus BLEU of lower-case text, tokenised as mteval-v13a does
NIST                    written here, on the same tokens
METEOR, ROUGE-L, CIDEr  pycocoevalcap's, after its Penn Treebank tokeniser, which needs Java as METEOR does
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import operator
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from redpeft.errors import RunError, UserError, first_line

logger = logging.getLogger(__name__)

CAPTION_SCORES = ("meteor", "rouge_l", "cider")
NO_JAVA = (
    "METEOR, ROUGE-L and CIDEr are left out, since they need Java: install a Java runtime such as OpenJDK (apt-get "
    "install default-jre-headless, brew install openjdk, conda install openjdk) and see that `java -version` answers"
)

Tokens = Sequence[str]


def require_scorers() -> None:
    """Raises `UserError` where a package that computes the scores is missing."""
    for package in ("sacrebleu", "pycocoevalcap"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"the scores of E2E need {package}: pip install redpeft[e2e]")


def has_java() -> bool:
    """Whether `java` runs: on a Mac without Java there is a command of that name which does not."""
    try:
        return subprocess.run(["java", "-version"], capture_output=True).returncode == 0
    except OSError:
        return False


def score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float | None]:
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
    from sacrebleu import corpus_bleu
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenise = Tokenizer13a()
    tokens = [tokenise(text.lower()).split() for text in predictions]
    reference_tokens = [[tokenise(text.lower()).split() for text in group] for group in references]
    streams = list(zip_longest(*references))  # the first reference of each, the second or None, ...
    scores: dict[str, float | None] = {
        "bleu": corpus_bleu(predictions, streams, lowercase=True, tokenize="13a", force=True).score,
        "nist": nist(tokens, reference_tokens),
    }
    if has_java():
        return scores | _caption_scores(predictions, references)
    logger.warning(NO_JAVA)
    return scores | dict.fromkeys(CAPTION_SCORES)


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
    except (OSError, ValueError) as error:  # Java ended early, or pycocoevalcap may not write beside its own files
        raise RunError(f"pycocoevalcap did not compute METEOR, ROUGE-L and CIDEr: {first_line(error)}") from error
    rouge, cider = (scorer().compute_score(expected, answers)[0] for scorer in (Rouge, Cider))
    return {"meteor": 100 * float(meteor), "rouge_l": 100 * float(rouge), "cider": float(cider)}


def _penn_tokens(groups: Sequence[Sequence[str]]) -> dict[int, list[str]]:
    """Texts in the tokens of pycocoevalcap's tokeniser, which wants one a line. METEOR separates texts by |||."""
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
        if scorer.lock.locked():  # it failed, and would wait for its own lock while it is deleted
            scorer.lock.release()
