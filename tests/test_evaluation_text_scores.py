"""Values recorded from nltk 3.10.4, rouge 1.0.1 and pycocoevalcap 1.2, and one worked by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmo_edge.evaluation.text_scores import bleu, cider, rouge_l, rouge_n, token_prf

# answer, gold, BLEU-1..4 (sentence_bleu), ROUGE-1, ROUGE-2, ROUGE-L (f), CIDEr-D over these six
RECORDED = [
    (
        "No acute cardiopulmonary process. Heart size is normal.",
        "The heart is normal in size. No acute cardiopulmonary abnormality. Lungs are clear.",
        (0.49393047, 0.30059651, 0.1836963, 0.0),
        (0.66666666, 0.31578947, 0.57142857),
        1.20118915,
    ),
    (
        "Findings: left pleural effusion. Impression: effusion.",
        "Findings: There is a small left pleural effusion. No pneumothorax. Impression: Small "
        "left effusion.",
        (0.32465247, 0.27438141, 0.20121898, 0.1516575),
        (0.625, 0.23529411, 0.625),
        1.10754817,
    ),
    (
        "the the the the",
        "the cat sat on the mat",
        (0.30326533, 0.0, 0.0, 0.0),
        (0.33333333, 0.0, 0.33333333),
        0.42662324,
    ),
    ("chest x-ray", "chest x-ray", (1.0, 1.0, 0.0, 0.0), (1.0, 1.0, 1.0), 5.0),
    (
        "A large mass in the right upper lobe, likely malignant. Suggest CT.",
        "There is a large mass within the right upper lobe. CT is recommended. No pleural "
        "effusion. No pneumothorax. Heart size normal.",
        (0.27281111, 0.18873965, 0.1360737, 0.0),
        (0.4516129, 0.25806451, 0.4516129),
        0.67184585,
    ),
    ("cardiomegaly", "enlarged heart", (0.0,) * 4, (0.0, 0.0, 0.0), 0.0),
]


@pytest.mark.parametrize(("answer", "gold", "bleus", "rouges", "_"), RECORDED)
def test_against_the_libraries(
    answer: str, gold: str, bleus: tuple[float, ...], rouges: tuple[float, ...], _: float
) -> None:
    assert [bleu(answer, gold, order) for order in (1, 2, 3, 4)] == pytest.approx(bleus, abs=1e-7)
    found = [rouge_n(answer, gold, 1), rouge_n(answer, gold, 2), rouge_l(answer, gold)]
    assert found == pytest.approx(rouges, abs=1e-7)


def test_cider_d_against_the_reference() -> None:
    answers, golds = [row[0] for row in RECORDED], [row[1] for row in RECORDED]
    expected = [row[4] for row in RECORDED]
    assert cider(answers, golds, clipped=True) == pytest.approx(expected, abs=1e-7)


def test_cider_by_hand() -> None:
    """Two references; "a" is in both and weighs 0, every other n-gram weighs log 2.

    Unigrams: answer {b}, gold {b, c} without "a": cosine 1 / sqrt 2. Bigrams: "a b" of both weighs
    alike, gold has "b c" too: 1 / sqrt 2. No longer ones in the answer.
    """
    first = cider(["a b", "a d"], ["a b c", "a d"])[0]
    assert first == pytest.approx(10 / 4 * (1 / math.sqrt(2) + 1 / math.sqrt(2)))


def test_words_by_hand() -> None:
    assert token_prf("left lung nodule", "nodule left") == pytest.approx((2 / 3, 1.0, 0.8))
    assert token_prf("", "x") == token_prf("x", "") == (0.0, 0.0, 0.0)
    # 4 of 4 words, but the answer is shorter than the gold: exp(1 - 6 / 4)
    assert bleu("the cat sat on", "the cat sat on the mat", 1) == pytest.approx(math.exp(-0.5))


@given(st.text(max_size=60), st.text(max_size=60))
def test_scores_stay_in_their_range(answer: str, gold: str) -> None:
    for value in (bleu(answer, gold, 2), rouge_n(answer, gold, 1), rouge_l(answer, gold)):
        assert 0 <= value <= 1 + 1e-9


@given(st.lists(st.sampled_from("abcdefg"), min_size=4, max_size=12))
def test_a_text_is_like_itself(words: list[str]) -> None:
    text = " ".join(words)
    assert bleu(text, text, 4) == pytest.approx(1)
    assert rouge_l(text, text) == pytest.approx(1, abs=1e-6)
