"""How well a decoded distribution tells the model's own next token, describes an entity, or gives an answer.

These are the measures of the paper's sections 4.1, 4.3, and 4.2 and 5. The functions score each sample; the
`evaluate.Metric`s average them, and are built and used without a network.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache

import datasets
import evaluate
import numpy as np
import torch
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from torch import Tensor

from pscope.arguments import as_list, excerpt
from pscope.errors import PscopeError

_CITATION = "Ghandeharioun et al., Patchscopes, ICML 2024, arXiv 2401.06102, section {}"


def surprisal(decoded: Tensor, model_logits: Tensor) -> Tensor:
    """−log p_model(decoded token), in nats, for token ids (samples, decodings) and logits (samples, vocab).

    The probability is the model's own, of the tokens that were decoded; the lower, the better were they told.
    Returns (samples, decodings). Raises PscopeError for what has not these shapes, and for ids without a logit.
    """
    shapes = decoded.ndim == model_logits.ndim == 2 and len(decoded) == len(model_logits)
    if not shapes or decoded.is_floating_point():
        given = f"{excerpt(decoded)} of {decoded.dtype} and {excerpt(model_logits)}"
        raise PscopeError(f"token ids (samples, decodings) and logits (samples, vocab) are needed, not {given}")
    if decoded.numel() and not 0 <= int(decoded.min()) <= int(decoded.max()) < model_logits.shape[1]:
        raise PscopeError(f"tokens are numbered from 0 to {model_logits.shape[1] - 1}, not as all that were decoded")
    log_p = model_logits.float().log_softmax(dim=-1)
    return -log_p.gather(1, decoded.to(log_p.device))


class PrecisionAt1(evaluate.Metric):
    """The share of samples whose decoded token is the model's own: argmax of the one = argmax of the other."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation=_CITATION.format("4.1"),
            inputs_description="predictions: decoded token ids; references: the model's own next-token ids",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"precision_at_1": float(np.mean(np.equal(predictions, references)))}


class Surprisal(evaluate.Metric):
    """The mean of −log p_model(decoded token), in nats."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation=_CITATION.format("4.1"),
            inputs_description="predictions: decoded token ids; references: the model's own next-token logits",
            features=datasets.Features(
                {
                    "predictions": datasets.Value("int64"),
                    "references": datasets.Sequence(datasets.Value("float32")),
                }
            ),
        )

    def _compute(self, predictions: list[int], references: list[list[float]]) -> dict[str, float]:
        decoded = torch.as_tensor(np.asarray(predictions))[:, None]
        return {"surprisal": surprisal(decoded, torch.as_tensor(np.asarray(references))).mean().item()}


class _Words(Tokenizer):
    """Words of any script, in lower case. On ASCII text these are rouge-score's own, which drop all other letters."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


_ROUGE_L = RougeScorer(["rougeL"], tokenizer=_Words())


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """ROUGE-L of each prediction against its reference, from 0 to 1: the F-measure over their longest common
    subsequence of words, without stemming.
    """
    pairs = [as_list(str, texts, "texts", "give strings") for texts in (predictions, references)]
    if len(pairs[0]) != len(pairs[1]):
        raise PscopeError(f"{len(pairs[0])} predictions came with {len(pairs[1])} references; each has one")
    return [
        float(_ROUGE_L.score(reference, prediction)["rougeL"].fmeasure)
        for prediction, reference in zip(*pairs, strict=True)
    ]


class RougeL(evaluate.Metric):
    """The mean ROUGE-L (F-measure, words of any script, no stemming) of predictions against one reference each."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation=_CITATION.format("4.3"),
            inputs_description="predictions: texts; references: one text for each",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {"rouge_l": float(np.mean(rouge_l(predictions, references)))}


def answer_found(text: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers stands in the text as whole words, with a capital wherever the answer has one.

    So "Jobs" is not found in "creates jobs", whereas "yen" is found in "the Yen", and "Japan" in "JAPAN". Accents,
    kinds of blanks, hyphens and apostrophes do not count: a hyphen is a blank, and other letters are compared as
    Unicode's NFKC has them. In scripts that write no blanks between words an answer must be set off by something else.
    """
    return _stands(text, answers, r"(?!\w)")


def answer_settled(text: str, answers: Sequence[str]) -> bool:
    """Whether `answer_found` holds however the text goes on: at its very end a word may yet become another one."""
    # What is yet half a character may become a letter.
    return _stands(text, answers, r"(?=[^\w\ufffd])")


def same_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether a text is one of the answers, all of it: capitals, an article before it, and what `answer_found` passes
    over do not count.
    """
    return normalised(text) in map(normalised, answers)


def normalised(answer: str) -> str:
    """What answers that are the same have in common."""
    return _plain(answer).casefold().removeprefix("the ")


def distinct_answers(answers: Iterable[str]) -> tuple[str, ...]:
    """The first of all answers that are the same."""
    distinct: dict[str, str] = {}
    for answer in answers:
        distinct.setdefault(normalised(answer), answer)
    return tuple(distinct.values())


def gives_away(text: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers stands in the text, with or without its capitals."""
    return answer_found(text, [answer.lower() for answer in answers])


def _stands(text: str, answers: Sequence[str], after: str) -> bool:
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, Iterable) or not all(isinstance(each, str) for each in (text, *answers)):
        raise PscopeError(f"answers are texts that may stand in one, not {excerpt(answers)} in {excerpt(text)}")
    text = _plain(text)
    return any(_pattern(answer, after).search(text) for answer in answers)


@lru_cache(maxsize=1 << 14)
def _pattern(answer: str, after: str) -> re.Pattern[str]:
    """The answer as a whole word, in which capitals match themselves alone, and small letters capitals too."""
    letters = [re.escape(letter) if letter.isupper() else f"(?i:{re.escape(letter)})" for letter in _plain(answer)]
    return re.compile(rf"(?<!\w){''.join(letters)}{after}")


class AnswerFound(evaluate.Metric):
    """The share of predictions in which one of the accepted answers stands, as whole words."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation=_CITATION.format("4.2 and 5"),
            inputs_description="predictions: texts; references: for each the list of accepted answers",
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        hits = [answer_found(text, answers) for text, answers in zip(predictions, references, strict=True)]
        return {"answer_found": float(np.mean(hits))}


_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bb\u02bc\u2032\u00b4`", "'"))


def _plain(text: str) -> str:
    """The text without accents and soft hyphens, with one kind of apostrophe, and one blank for blanks and hyphens."""
    letters = unicodedata.normalize("NFKD", text.translate(_APOSTROPHES))
    text = unicodedata.normalize("NFKC", re.sub("[\u0300-\u036f\u00ad]", "", letters))
    return " ".join(re.sub(r"(?<=\w)[-\u2010-\u2015](?=\w)", " ", text).split())
