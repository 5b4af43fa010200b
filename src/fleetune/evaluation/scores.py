# SPDX-License-Identifier: Apache-2.0
"""Score answers against their references, in percent: Rouge-L, token F1, exact match.

Sources: Rouge-L of Lin (2004) by the `rouge-score` package with its Porter stemmer, as Natural Instructions
(arXiv 2204.07705) and FedKSeed (arXiv 2312.06353) use it; F1 and exact match of SQuAD (arXiv 1606.05250).
"""

from __future__ import annotations

import functools
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from fleetune.errors import DataError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@functools.cache
def _rouge() -> Any:
    # imported here: it loads nltk, half a second that only Rouge should wait for
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean Rouge-L F1 over the pairs, in percent (Lin 2004; `rouge-score`, Porter stemmer on).

    The package keeps only a-z and 0-9 of a lower-cased text, so text in another script scores 0.
    """
    return _mean_score(lambda a, r: float(_rouge().score(r, a)["rougeL"].fmeasure), answers, references)


def token_f1(answers: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean F1 of the two bags of words, in percent, on normalised text (SQuAD's evaluation script).

    Where either is empty after normalising, the pair scores 1 if both are, else 0 (SQuAD 2.0's rule).
    """
    return _mean_score(_f1, answers, references)


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of answers equal to their reference after normalising, in percent (SQuAD's script)."""
    return _mean_score(lambda a, r: float(normalise(a) == normalise(r)), answers, references)


def normalise(text: str) -> str:
    """Lower the case; drop ASCII punctuation, English articles and extra spaces (SQuAD's `normalize_answer`)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _f1(answer: str, reference: str) -> float:
    got, want = normalise(answer).split(), normalise(reference).split()
    if not got or not want:
        return float(got == want)
    same = sum((Counter(got) & Counter(want)).values())
    return 2 * same / (len(got) + len(want))


def _mean_score(
    score: Callable[[str, str], float], answers: Sequence[str], references: Sequence[str]
) -> float:
    if not answers:
        raise DataError("no answers to score", hint="evaluate on at least one row")
    pairs = zip(answers, references, strict=True)
    return 100.0 * math.fsum(score(answer, reference) for answer, reference in pairs) / len(answers)
