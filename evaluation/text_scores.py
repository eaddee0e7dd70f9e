"""How alike two texts are: token F1, BLEU, ROUGE and CIDEr as MedEvalKit computes them.

Reference implementations, against which the tests hold recorded values: nltk 3.10 ``sentence_bleu``
without smoothing, the ``rouge`` package 1.0.1 (sets of n-grams, sentences cut at full stops),
pycocoevalcap 1.2 ``CiderScorer`` (CIDEr-D: clipped counts, length penalty) with idf over the given
references, and the plain CIDEr of Vedantam et al. 2015 without both. No stemming, no synonyms, no
model; MedEvalKit's tokenizer for CIDEr (a Java program) is replaced by splitting at spaces.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

_EPSILON = 1e-8  # as in the rouge package
_CIDER_N = 4
_CIDER_SIGMA = 6.0

Gram = tuple[str, ...]


def words_of(text: str) -> list[str]:
    """Lower-case words; a full stop is a word of its own."""
    return [word for word in text.lower().replace(".", " .").split(" ") if word]


def token_prf(answer: str, gold: str) -> tuple[float, float, float]:
    """Precision, recall and F1 of the sets of words; all 0 when either text is empty."""
    said, wanted = set(answer.lower().split()), set(gold.lower().split())
    shared = len(said & wanted)
    if not shared:
        return 0.0, 0.0, 0.0
    precision, recall = shared / len(said), shared / len(wanted)
    return precision, recall, 2 * precision * recall / (precision + recall)


def bleu(answer: str, gold: str, order: int) -> float:
    """Sentence BLEU with n-grams up to ``order``, equal weights, brevity penalty, no smoothing."""
    said, wanted = words_of(answer), words_of(gold)
    if not said:
        return 0.0
    logs = 0.0
    for size in range(1, order + 1):
        have, want = Counter(_grams(said, size)), Counter(_grams(wanted, size))
        shared = sum(min(count, want[gram]) for gram, count in have.items())
        if not shared:
            return 0.0
        logs += math.log(shared / max(1, sum(have.values()))) / order
    penalty = 1.0 if len(said) > len(wanted) else math.exp(1 - len(wanted) / len(said))
    return penalty * math.exp(logs)


def rouge_n(answer: str, gold: str, size: int) -> float:
    """F1 of the sets of n-grams over all words; sentences are only joined."""
    said, wanted = (
        set(_grams(_flat(_sentences(text)), size)) for text in (answer.lower(), gold.lower())
    )
    return _f1(len(said & wanted), len(said), len(wanted))


def rouge_l(answer: str, gold: str) -> float:
    """F1 of the union of longest common subsequences, sentence by sentence, over sets of words."""
    said, wanted = _sentences(answer.lower()), _sentences(gold.lower())
    if not said or not wanted:
        return 0.0
    union: set[str] = set()
    for sentence in wanted:
        for other in said:
            union |= set(_longest_common(sentence, other))
    return _f1(len(union), len(set(_flat(said))), len(set(_flat(wanted))))


def cider(answers: Sequence[str], golds: Sequence[str], *, clipped: bool = False) -> list[float]:
    """CIDEr of each answer against its one gold, times 10; rarity is counted over ``golds``.

    ``clipped``: CIDEr-D. With one gold alone every word is common, and all scores are 0.
    """
    wanted = [_counts(gold.lower()) for gold in golds]
    rarity = Counter(gram for counts in wanted for gram in counts)
    total = math.log(max(1, len(golds)))
    return [
        _cider(_counts(answer.lower()), gold, rarity, total, clipped)
        for answer, gold in zip(answers, wanted, strict=True)
    ]


def _cider(
    said: Counter[Gram],
    wanted: Counter[Gram],
    rarity: Counter[Gram],
    total: float,
    clipped: bool,
) -> float:
    score = 0.0
    for size in range(1, _CIDER_N + 1):
        have, want = (
            {
                gram: count * (total - math.log(max(1, rarity[gram])))
                for gram, count in counts.items()
                if len(gram) == size
            }
            for counts in (said, wanted)
        )
        lengths = [
            math.sqrt(sum(value * value for value in side.values())) for side in (have, want)
        ]
        product = sum(
            (min(value, want.get(gram, 0.0)) if clipped else value) * want.get(gram, 0.0)
            for gram, value in have.items()
        )
        score += product / (lengths[0] * lengths[1]) if lengths[0] and lengths[1] else 0.0
    if clipped:  # the reference counts bigrams as the length
        sizes = [sum(n for gram, n in side.items() if len(gram) == 2) for side in (said, wanted)]
        score *= math.exp(-((sizes[0] - sizes[1]) ** 2) / (2 * _CIDER_SIGMA**2))
    return 10 * score / _CIDER_N


def _counts(text: str) -> Counter[Gram]:
    words = text.split()
    return Counter(gram for size in range(1, _CIDER_N + 1) for gram in _grams(words, size))


def _grams(words: Sequence[str], size: int) -> list[Gram]:
    return [tuple(words[at : at + size]) for at in range(len(words) - size + 1)]


def _sentences(text: str) -> list[list[str]]:
    """Words of each sentence; one of white space holds the word "", as in the rouge package."""
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _flat(sentences: Iterable[Sequence[str]]) -> list[str]:
    return [word for sentence in sentences for word in sentence]


def _f1(shared: int, said: int, wanted: int) -> float:
    precision, recall = shared / max(1, said), shared / max(1, wanted)
    return 2 * precision * recall / (precision + recall + _EPSILON)


def _longest_common(a: Sequence[str], b: Sequence[str]) -> list[str]:
    """One longest common subsequence, chosen as the reference does when there are several."""
    table = [[0] * (len(b) + 1)]
    for word in a:
        above, row = table[-1], [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        table.append(row)
    found: list[str] = []
    i, j = len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            found.append(a[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]
