import math
import socket

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from pscope.metrics import (
    AnswerFound,
    PrecisionAt1,
    RougeL,
    Surprisal,
    answer_found,
    answer_settled,
    distinct_answers,
    gives_away,
    rouge_l,
    same_answer,
    surprisal,
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a metric asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_precision_at_1():
    result = PrecisionAt1().compute(predictions=[3, 1, 4, 1], references=[3, 1, 5, 9])
    assert result == {"precision_at_1": 0.5}


def test_surprisal_is_of_the_models_distribution_at_the_decoded_token():
    # p_model = (1/6, 2/6, 3/6): whatever was decoded, its probability is read off the model's distribution.
    logits = torch.tensor([[1.0, 2.0, 3.0]]).log().repeat(2, 1) + 7
    expected = [-math.log(1 / 6), -math.log(3 / 6)]
    values = surprisal(torch.tensor([[0], [2]]), logits)
    torch.testing.assert_close(values.flatten(), torch.tensor(expected))
    result = Surprisal().compute(predictions=[0, 2], references=logits.tolist())
    assert result["surprisal"] == pytest.approx(sum(expected) / 2)


def test_several_decodings_of_one_sample_share_its_distribution():
    torch.manual_seed(0)
    logits, decoded = torch.randn(3, 5), torch.tensor([[0, 4], [1, 1], [2, 3]])
    values = surprisal(decoded, logits)
    for sample in range(3):
        for place in range(2):
            expected = -torch.log(torch.softmax(logits[sample], 0)[decoded[sample, place]])
            torch.testing.assert_close(values[sample, place], expected)


def test_rouge_l_by_hand():
    # Longest common subsequences of words: "american singer" of 3 and 5, "the the" of 2 and 4, none, and all.
    predictions = [": American pop singer", "the The", "1, 2", "Ein Größtes"]
    references = ["American singer, dancer and actress", "the end of the world", "three", "ein größtes!"]
    f = [2 * (2 / 3) * (2 / 5) / (2 / 3 + 2 / 5), 2 * (2 / 2) * (2 / 5) / (2 / 2 + 2 / 5), 0, 1]
    assert rouge_l(predictions, references) == pytest.approx(f)
    assert RougeL().compute(predictions=predictions, references=references) == pytest.approx({"rouge_l": sum(f) / 4})
    assert rouge_l(["", " \n"], ["something", "else"]) == [0, 0]


def test_rouge_l_is_that_of_rouge_score_on_ascii_and_counts_words_of_any_script():
    texts = ["It's a 3-part_thing, isn't it?", "a part of it is a THING", "is it? 3 things a-part", "столица России"]
    standard = RougeScorer(["rougeL"])
    for prediction in texts[:3]:
        for reference in texts[:3]:
            expected = standard.score(reference, prediction)["rougeL"].fmeasure
            assert rouge_l([prediction], [reference]) == [expected]
    assert rouge_l(["Столица Франции"], [texts[3]]) == [0.5]


def test_an_answer_is_found_as_whole_words():
    assert answer_found("It is the Yen, said he", ["yen"])
    assert answer_found("in New\n  York.", ["Boston", "New York"])
    assert answer_found("C++ and (A.B.) are", ["A.B."])
    assert not answer_found("Yenisei and doyen", ["yen"])
    assert not answer_found("", ["yen"])
    assert not answer_found("anything", [])
    predictions, references = ["the yen", "the dollar", "euro"], [["yen"], ["euro", "franc"], ["franc", "euro"]]
    assert AnswerFound().compute(predictions=predictions, references=references) == {"answer_found": 2 / 3}


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        ("creates jobs", "Jobs", False),
        ("the gates of hell", "Gates", False),
        ("whales and wales", "Wales", False),
        ("some of us", "US", False),
        ("new york", "New York", False),
        ("NEW YORK CITY", "New York", True),
        ("an Iphone", "iPhone", False),
        ("An IPHONE", "iPhone", True),
        ("Gold, GOLD", "gold", True),
        ("Ärzte in ÅRHUS", "Århus", True),
    ],
)
def test_a_name_is_found_with_its_capitals(text, answer, found):
    assert answer_found(text, [answer]) == answer_settled(f"{text}.", [answer]) == found


def test_an_answer_is_given_away_in_any_case():
    assert gives_away("She creates JOBS and coca cola", ["Jobs"])
    assert gives_away("She creates JOBS and coca cola", ["tea", "Coca-Cola"])
    assert not gives_away("She creates jobs", ["Job"])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Coca Cola", "Coca-Cola"),
        ("Coca\u2011Cola", "Coca\u2013Cola"),
        ("Sao Paulo", "São Paulo"),
        ("Sa\u0303o Paulo", "S\u00e3o Paulo"),
        ("McDonald\u2019s", "McDonald's"),
        ("McDonald\u00b4s", "McDonald\u02bcs"),
        ("Tür\u00adkiye", "Turkiye"),
        ("ＫＦＣ", "KFC"),
        ("Ёлкин", "Елкин"),
        ("서울", "\u1109\u1165\u110b\u116e\u11af"),
    ],
)
def test_accents_hyphens_and_apostrophes_do_not_count(one, other):
    assert answer_found(f"in {one}", [other])
    assert answer_settled(f"in {other}, now", [one])


def test_an_answer_is_settled_once_its_last_word_cannot_grow():
    assert answer_found("a fish", ["fish"])
    assert not answer_settled("a fish", ["fish"])
    assert not answer_settled("a fishing", ["fish"])
    assert answer_settled("a fish,", ["fish"])
    assert answer_settled("a fish in the fish", ["fish"])
    # Whatever follows, which may be an accent, or turn a hyphen into one within a word.
    endings = ["", "ing", "\u0301", "-eye", "'s", "\u00ad", " and", "s", "\u00adery", "1"]
    for text in ("a fish-", "a fish'", "a fish\u00ad,", "A FISH;"):
        assert answer_settled(text, ["fish"])
        assert all(answer_found(text + ending, ["fish"]) for ending in endings)
    assert not answer_settled("a fish\u00ad", ["fish"])
    # A token may end with half of a letter.
    assert not answer_settled("a fish\ufffd", ["fish"])


def test_an_answer_is_the_same_as_a_whole():
    assert same_answer("the Yen", ["dollar", "yen"])
    assert same_answer("Sao-Paulo", ["São Paulo"])
    # It may stand in another one, of which it is no more than a part.
    assert answer_found("Emily Brontë", ["Charlotte Brontë", "Brontë"])
    assert not same_answer("Emily Brontë", ["Charlotte Brontë", "Brontë"])


def test_answers_that_are_the_same_are_one():
    assert distinct_answers(["Euro", "the euro", "yen", "Guinea", "Guinea-Bissau"]) == (
        "Euro",
        "yen",
        "Guinea",
        "Guinea-Bissau",
    )
