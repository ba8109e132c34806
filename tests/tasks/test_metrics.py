from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.metrics import matthews_corrcoef

from redpeft.errors import RunError, UserError
from redpeft.tasks import metrics


def test_scores_of_classes():
    matrix = metrics.count_classes(np.array([0, 1, 1, 2, 2]), np.array([0, 0, 1, 2, 1]), 3)
    assert matrix.tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    scores = metrics.score_matrix(matrix)
    assert scores["accuracy"] == pytest.approx(0.6)
    assert scores["f1_macro"] == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)
    # Gorodkin's formula by hand: 3 of 5 right; predicted 2, 2, 1 of each class, true 1, 2, 2
    assert scores["matthews"] == pytest.approx((3 * 5 - (2 + 4 + 2)) / np.sqrt((25 - 9) * (25 - 9)))


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
