import math
import socket

import pytest
import torch

from pscope.metrics import PrecisionAt1, Surprisal, surprisal


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
