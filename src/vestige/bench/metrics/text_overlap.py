"""Overlap of a reply with an answer: token F1, ROUGE-L by two definitions, and similarity of strings."""

import importlib
import logging
import re
import string
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

from vestige.errors import InputError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# LongBench removes from Chinese words the marks of CJK and full-width Latin, and the long dashes and quotes.
_CJK_MARKS = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】"  # noqa: RUF001
    "〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."  # noqa: RUF001
)
_CJK_PUNCTUATION = str.maketrans("", "", string.punctuation + _CJK_MARKS)


def normalize(text: str) -> str:
    """Return a text as SQuAD compares it: lower case, no ASCII punctuation, no English articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(reply: str, answer: str) -> float:
    """Return the F1 of the tokens that both texts have, counted with repeats, after :func:`normalize`."""
    return _f1(normalize(reply).split(), normalize(answer).split())


def token_f1_zh(reply: str, answer: str) -> float:
    """Return the F1 of the Chinese words that both texts have, by jieba, without punctuation and white space."""
    return _f1(_clean_words(reply), _clean_words(answer))


def _clean_words(text: str) -> list[str]:
    cleaned = ("".join(word.lower().translate(_CJK_PUNCTUATION).split()) for word in _segment(text))
    return [word for word in cleaned if word]


def _f1(reply: Sequence[str], answer: Sequence[str]) -> float:
    common = (Counter(reply) & Counter(answer)).total()
    return 2 * common / (len(reply) + len(answer)) if common else 0.0


def rouge_l(reply: str, answer: str) -> float:
    """Return ROUGE-L's F1 as the package ``rouge`` 1.0.1 computes it: the one in LongBench's tables.

    Both texts are split at full stops into sentences and at white space into words, case and punctuation kept. A word
    is common if it is in the longest common subsequence of any pair of sentences. Words count once, however often they
    occur. Google's ``rouge-score`` (:func:`rouge_score`) takes each text as one sentence, keeps only the letters a-z
    and digits, in lower case, and counts every occurrence. Differs: a sentence pair too long for the package's
    recursion is scored 0 by LongBench, and here like any pair.
    """
    replied, wanted = _split_sentences(reply), _split_sentences(answer)
    if not replied or not wanted:
        return 0.0
    common = {word for a in wanted for b in replied for word in _common_subsequence(a, b)}
    precision = len(common) / len({word for sentence in replied for word in sentence})
    recall = len(common) / len({word for sentence in wanted for word in sentence})
    return 2 * precision * recall / (precision + recall + 1e-8)


def rouge_l_zh(reply: str, answer: str) -> float:
    """Return :func:`rouge_l` of Chinese texts, whose words jieba finds."""
    return rouge_l(" ".join(_segment(reply)), " ".join(_segment(answer)))


def rouge_score(reply: str, answer: str) -> float:
    """Return ROUGE-L's F1 as Google's ``rouge-score`` computes it, without stemming: English only."""
    scorer = _import("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    return float(scorer.score(answer, reply)["rougeL"].fmeasure)


def similarity(reply: str, answer: str) -> float:
    """Return the similarity of two strings: 2 x common characters in order / all characters, in whole hundredths.

    LongBench takes the ratio from fuzzywuzzy, which rounds it so and counts like rapidfuzz if python-Levenshtein is
    installed; without it fuzzywuzzy uses difflib, whose numbers can be lower.
    """
    percent: float = _import("rapidfuzz.fuzz").ratio(reply, answer)
    return round(percent) / 100


def _split_sentences(text: str) -> list[list[str]]:
    """Return the words of each sentence; white space between two full stops is a sentence of one empty word."""
    return [part.split() or [""] for part in text.split(".") if part]


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> list[str]:
    """Return the words of a longest common subsequence; of several, the one that ``rouge`` finds."""
    lengths = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, word in enumerate(a):
        for j, other in enumerate(b):
            lengths[i + 1][j + 1] = lengths[i][j] + 1 if word == other else max(lengths[i][j + 1], lengths[i + 1][j])
    words, i, j = [], len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            words.append(a[i])
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def _segment(text: str) -> list[str]:
    jieba = _import("jieba")
    jieba.setLogLevel(logging.WARNING)  # jieba logs the build of its dictionary
    return list(jieba.cut(text, cut_all=False))


def _import(module: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # compiling old packages gives warnings about their escapes
            return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0].replace("_", "-")
        raise InputError(f'this metric needs {package}, which is not installed: pip install "vestige[bench]"') from None
