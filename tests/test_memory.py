import numpy as np
import pytest
import torch

import pscope
from pscope import Patchscope
from pscope.engine.staircase import Staircase
from pscope.memory import out_of_memory, spare


def no_room(*_, **__):
    """What torch raises on a CPU, asked for more than any machine has."""
    torch.empty(10**15)


def test_each_kind_of_running_out_is_known():
    for ask in (no_room, lambda: np.empty(10**15), lambda: [0] * 10**15):
        with pytest.raises((RuntimeError, MemoryError)) as raised:
            ask()
        assert out_of_memory(raised.value), raised.value
    for error in (torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: out of memory")):
        assert out_of_memory(error)
    with pytest.raises(RuntimeError) as raised:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not out_of_memory(raised.value)
    assert not out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED."))


def test_half_of_the_fuller_gpu_is_spared(monkeypatch):
    free = {torch.device("cuda", 0): 60 * 2**30, torch.device("cuda", 1): 20 * 2**30}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (free[gpu], 80 * 2**30))
    assert spare({torch.device("cpu"), *free}) == 10 * 2**30
    assert spare({torch.device("cuda", 0)}) == 30 * 2**30
    assert spare({torch.device("cpu"), torch.device("meta")}) is None


def test_a_path_without_room_is_not_taken_for_one_that_does_not_run(tiny, monkeypatch):
    monkeypatch.setattr(Staircase, "start", no_room)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        Patchscope(tiny, tiny.prompt("one two x"))


def test_a_model_without_room_is_not_taken_for_one_that_cannot_be_loaded(tiny, tmp_path, monkeypatch):
    tiny.hf.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr("pscope.models.loading.AutoModelForCausalLM.from_pretrained", no_room)
    with pytest.raises(pscope.ModelError, match="the weights of .* do not fit into the memory of cpu; try bfloat16"):
        pscope.load(tmp_path, device="cpu")
