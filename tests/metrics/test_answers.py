"""Answers to questions: every benchmark's own way of reading them, edge case by edge case."""

import itertools

import numpy as np
import pytest

from pipelines.metrics import vqa_accuracy, vqa_normalize
from pipelines.metrics.choice import scienceqa_correct, seed_correct
from pipelines.metrics.exact_match import exact_match
from pipelines.metrics.mmbench import circular_hit, mmbench_letter
from pipelines.metrics.mme import mme_answer, mme_image_score
from pipelines.metrics.mmmu import mmmu_letter, mmmu_open, mmmu_open_correct
from pipelines.metrics.pope import pope_counts, pope_metrics
from pipelines.metrics.vqa import _CONTRACTIONS


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Yes.", "yes"),
        ("two", "2"),
        ("none", "0"),
        ("Zero", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("1,000", "1000"),
        ("3.5.", "3.5"),
        ("ice-cream", "ice cream"),
        ("ice- cream", "ice cream"),
        ("a/b", "b"),
        ("U.S.", "us"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),  # two apostrophes are missing
        ("couldn'tve", "couldn't've"),
        ("its", "its"),
        ("it's", "it 's"),
        ("lets", "lets"),
        ("Im", "im"),
        ("somebody'd", "somebodyd"),
        ("an apple a day", "apple day"),
        ("The", ""),
        ("5 . 3", "5 3"),
        ("12:30", "12:30"),
        ("50%", "50%"),
        ("hes", "he's"),
        ("what?\tred\nblue", "what red blue"),
        ("red - blue-green", "red bluegreen"),  # one mark that touches a space takes all of its kind with it
        ("a_b;c", "b c"),
        ("." * 40, "." * 8),  # the published code passes a flag where a count belongs
        ("", ""),
    ],
)
def test_the_answer_processor(text: str, normal: str):
    assert vqa_normalize(text) == normal


def test_the_contractions_are_the_published_table():
    """120 keys, less four with capitals that never match lower-case text and two that map to themselves."""
    assert len(_CONTRACTIONS) == 120 - 4 - 2
    assert len(set(_CONTRACTIONS.values())) == 98 - 3 - 2


@pytest.mark.parametrize("matching", range(11))
def test_soft_accuracy_is_the_mean_over_leaving_one_annotator_out(matching: int):
    answers = ["two"] * matching + [f"other{i}" for i in range(10 - matching)]
    leave_one_out = [
        min(1, sum(other in ("two", "2") for other in answers[:i] + answers[i + 1 :]) / 3) for i in range(10)
    ]
    assert vqa_accuracy("2", answers) == pytest.approx(np.mean(leave_one_out), abs=1e-12)
    assert vqa_accuracy("2", answers) == pytest.approx([0, 0.3, 0.6, 0.9, *[1] * 7][matching])


def test_soft_accuracy_leaves_the_answers_as_they_are():
    answers = ["The Dog"] * 10
    vqa_accuracy("dog", answers)
    assert answers == ["The Dog"] * 10


@pytest.mark.parametrize("answers", [[], "dog"])
def test_soft_accuracy_needs_a_list_of_answers(answers):
    with pytest.raises(ValueError, match="answers must be a list"):
        vqa_accuracy("dog", answers)


@pytest.mark.parametrize(
    ("prediction", "target", "equal"),
    [
        ("Yes.", "yes", True),
        ("t-shirt", "tshirt", True),
        ("t shirt", "t-shirt", False),  # deleted, not replaced by a space
        (" left ", "left", True),
        ("left", "left ", False),
        ("the dog", "dog", False),
        ("2", "two", False),
        ("a  b", "a b", False),
        ("", "yes", False),
        ("...", "!", False),
        ("!", "!", True),
    ],
)
def test_exact_match_ignores_case_and_punctuation_and_nothing_else(prediction: str, target: str, equal: bool):
    assert exact_match(prediction, target) is equal


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("B", "B"),
        ("The answer is B", "B"),
        ("A", "A"),
        ("A dog", "A"),  # three words at most: not taken for an article
        ("A is right here", None),  # more than three words
        ("A or B", None),
        ("B.", "B"),
        ("B, because", "B"),
        ("(C)", "C"),
        ("It is (C).", "C"),
        ("Answer :D", "D"),
        ("Answer:D", None),  # the colon has to open the word
        ("B. or C.", None),
        ("(B) or C.", "C"),  # `X.` is tried before `(X)`
        ("E", "E"),  # five letters whatever the options
        ("b", None),
        ("a red bus", "A"),
        ("a RED bus or a cat", None),
        ("a banana", None),  # `nan`, the absent option, is in it, and nothing else
        ("", None),
    ],
)
def test_mmbench_rules_in_their_order(prediction: str, letter: str | None):
    choices = ["red bus", "cat", "nan", "nan"] if prediction == "a banana" else ["red bus", "cat", "tree", "sky"]
    assert mmbench_letter(prediction, choices) == letter


def test_mmbench_counts_the_absent_option_as_a_text():
    assert mmbench_letter("banana split", ["apple", "pear", "plum", "nan"]) == "D"


def test_a_circular_question_needs_every_copy():
    assert circular_hit(["A", "B"], ["A", "B"])
    assert not circular_hit(["A", None], ["A", "B"])
    with pytest.raises(ValueError, match="one length"):
        circular_hit([], [])


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("Yes", "yes"),
        (" no. ", "no"),
        ("Y", "yes"),
        ("n", "no"),
        ("x", "other"),
        ("Yes, it is", "yes"),
        ("not at all", "no"),
        ("none", "no"),
        ("now yes", "no"),  # only the first four characters are read
        ("a yes", "other"),
        ("", "other"),
    ],
)
def test_mme_reads_the_first_four_characters(prediction: str, answer: str):
    assert mme_answer(prediction) == answer


def test_an_mme_image_scores_accuracy_plus_accuracy_plus():
    assert [mme_image_score(pair) for pair in ([False, False], [True, False], [True, True])] == [0, 50, 200]
    with pytest.raises(ValueError, match="2 questions, got 1"):
        mme_image_score([True])


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("(B)", "B"),
        ("B", "B"),
        ("B.", "B"),
        ("B. red", "B"),
        ("(A) no, (C)", "C"),  # the last one
        ("A B A C", "C"),
        ("NASA", "A"),  # a letter before a space, even at the end of a word
        ("NASA B", "B"),  # ` B ` stands alone, the A does not
        ("it looks like a red bus to me", "A"),
        ("first red bus then some cat I think", "B"),
        ("'B'", "B"),
        ("A\n", "A"),  # white space is no part of an answer
        ("\nB. ", "B"),
        ("A) dog", "drawn"),
        ("bus", "drawn"),
        ("a red bus", "drawn"),  # too short to be searched for an option's text
    ],
)
def test_mmmu_letters(prediction: str, letter: str):
    found, drawn = mmmu_letter(prediction, ["red bus", "cat", "tree"], "validation_Art_1")
    assert drawn is (letter == "drawn")
    assert found == letter or (drawn and found in "ABC")


def test_mmmu_draws_by_the_question_and_not_by_the_order():
    letters = [mmmu_letter("?!x", ["a", "b", "c", "d"], f"validation_Art_{i}")[0] for i in range(400)]
    again = [mmmu_letter("?!x", ["a", "b", "c", "d"], f"validation_Art_{i}")[0] for i in reversed(range(400))]
    assert letters == again[::-1]
    assert all(60 < letters.count(letter) < 140 for letter in "ABCD")  # 100 expected, standard deviation 8.7


def test_mmmu_never_guesses_for_silence():
    assert mmmu_letter("  ", ["a", "b"], "validation_Art_1") == (None, False)
    assert not mmmu_open_correct("", "5")


def test_mmmu_needs_choices():
    with pytest.raises(ValueError, match="must not be empty"):
        mmmu_letter("A", [], "validation_Art_1")


@pytest.mark.parametrize(
    ("prediction", "answer", "correct"),
    [
        ("5", "5", True),
        ("The answer is 5.", "5.00", True),
        ("x = 1,234.5", "1234.5", True),
        ("about 2.5e3 units", "2500", True),
        ("3.14159", "3.14", True),  # two decimals
        ("-3", "3", False),
        ("-3", "-3", True),
        ("it is a ribosome", "Ribosome", True),  # contained
        ("ribosomes", "ribosome", True),
        ("so the result is mitochondria\nnothing else", "mitochondria", True),
        ("cat is dog", "cat", False),  # the tail after the cue counts, not the whole
        ("a b", "b", True),
        ("abc", "b", False),  # a lone letter needs a space beside it
        ("12 apples", "2", False),
        ("so the end\n7", "7", False),  # a line without a cue is not read once another has one
        ("the bus could be x =", "bus", True),  # the last cue has nothing after it, so the whole counts
        ("the answer is ?\nso it is 4", "?", False),  # a lone mark is no answer
    ],
)
def test_mmmu_open_answers(prediction: str, answer: str, correct: bool):
    assert mmmu_open_correct(prediction, answer) is correct


def test_mmmu_reads_numbers_in_every_notation():
    assert set(mmmu_open("1,000 and 2e3 and .5 and -7")) >= {1000.0, 2000.0, 0.5, -7.0}


def test_pope_counts_and_ratios():
    told = [("yes", "yes"), ("Yes ", "yes"), ("no", "yes"), ("yes.", "yes"), ("yes", "no"), ("no", "no"), ("", "no")]
    metrics = pope_metrics(np.sum([pope_counts(*pair) for pair in told], axis=0))
    assert metrics["pope_accuracy"] == pytest.approx(3 / 7)
    assert metrics["pope_precision"] == pytest.approx(2 / 3)
    assert metrics["pope_recall"] == pytest.approx(2 / 3)  # `yes.` is not a clear no, so it is not a miss
    assert metrics["pope_f1_score"] == pytest.approx(2 / 3)
    assert metrics["pope_yes_ratio"] == pytest.approx(4 / 7)  # of the right answers
    assert metrics["said_yes_ratio"] == pytest.approx(3 / 7)


def test_pope_without_a_yes_has_f1_zero():
    metrics = pope_metrics(np.sum([pope_counts("no", "no"), pope_counts("no", "yes")], axis=0))
    assert metrics["pope_f1_score"] == metrics["pope_precision"] == 0.0


def test_pope_wants_yes_or_no_as_the_right_answer():
    with pytest.raises(ValueError, match="must be yes or no, got 'maybe'"):
        pope_counts("yes", "maybe")


@pytest.mark.parametrize(
    ("prediction", "scienceqa", "seed"),
    [
        ("B", True, True),
        (" B ", True, True),
        ("B. red", True, True),
        ("B) red", False, True),
        ("Because", False, True),  # SEED reads the first character alone
        ("b", False, False),
        ("A", False, False),
        ("(B)", False, False),
        ("", False, False),
    ],
)
def test_letters_of_scienceqa_and_seed(prediction: str, scienceqa: bool, seed: bool):
    assert scienceqa_correct(prediction, "B") is scienceqa
    assert seed_correct(prediction, "B") is seed


def test_no_reader_fails_on_strange_text():
    strange = ["", " ", "\n", ".", "\u00e9\u4e2d", "A" * 500, "(((", "1e999", "nan", "-", "'s", "?!"]
    for text, other in itertools.product(strange, strange):
        exact_match(text, other)
        vqa_accuracy(text, [other] * 10)
        mmbench_letter(text, [other, "b"])
        mme_answer(text)
        mmmu_letter(text, [other, "b"], "validation_Art_1")
        mmmu_open_correct(text, other)
