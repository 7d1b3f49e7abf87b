import pytest
import torch
from conftest import random_model, without_a_number
from test_generate import ending
from transformers import MambaConfig, MambaForCausalLM

from pscope import Decoding, PromptError, PscopeError, RowError, continue_prompts
from pscope.engine.generate import CachedRows

TEXTS = ["one two three", "a", "The quick brown fox jumps", "four five six", "b", "seven eight nine"]


def greedy(model, ids, new_tokens, end_tokens=()):
    ids, spoken = list(ids), []
    while len(spoken) < new_tokens and not (spoken and spoken[-1] in end_tokens):
        with torch.no_grad():
            spoken.append(model.hf(torch.tensor([ids + spoken]), use_cache=False).logits[0, -1].argmax().item())
    return spoken


@pytest.mark.parametrize("path", ["staircase", "plain", "uncached"])
@pytest.mark.parametrize("memory", [1, 2**30])
def test_prompts_of_any_length_against_a_plain_loop(tiny, path, memory):
    prompts = [tiny.prompt(text) for text in TEXTS]
    endless = [greedy(tiny, prompt.ids, 8) for prompt in prompts]
    end_tokens = {endless[0][1], endless[2][4]}
    spoken = dict(continue_prompts(ending(tiny, end_tokens), prompts, Decoding(8), memory=memory, path=path))
    assert sorted(spoken) == list(range(len(TEXTS)))
    for index, prompt in enumerate(prompts):
        assert spoken[index] == greedy(tiny, prompt.ids, 8, end_tokens)
    assert len({len(tokens) for tokens in spoken.values()}) > 2


def test_shorter_prompts_wait_for_longer_ones(tiny, monkeypatch):
    texts = ["one", "two three", "four five", "six seven eight", "one two three four five six seven eight nine"]
    prompts = [tiny.prompt(text) for text in texts]
    by_length = {len(prompt) for prompt in prompts}
    assert len(by_length) == 4
    assert max(by_length) - min(by_length) > 6
    widths, step = [], CachedRows.step

    def spy(rows, tokens):
        widths.append(len(tokens))
        step(rows, tokens)

    monkeypatch.setattr(CachedRows, "step", spy)
    alone = [greedy(tiny, prompt.ids, 6) for prompt in prompts]
    assert dict(continue_prompts(tiny, prompts, Decoding(6), path="staircase")) == dict(enumerate(alone))
    # The longest one comes when all others have ended.
    assert max(widths) == 4
    assert sum(widths) == 5 * len(prompts)
    # A stop string is looked for in what each has said itself, however much others of its batch have.
    stop = tiny.tokenizer.decode([alone[1][1]])
    decoding = Decoding(6, stop=(stop,))
    apart = {index: dict(continue_prompts(tiny, [prompt], decoding))[0] for index, prompt in enumerate(prompts)}
    assert dict(continue_prompts(tiny, prompts, decoding)) == apart
    assert len({len(tokens) for tokens in apart.values()}) > 1


def test_the_default_model_says_what_generate_says(smollm2):
    prompts = [smollm2.prompt(text) for text in ("The capital of France is", "Water boils at", "Two and two")]
    for index, tokens in continue_prompts(smollm2, prompts, Decoding(12)):
        ids = torch.tensor([prompts[index].ids])
        with torch.no_grad():
            expected = smollm2.hf.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        assert tokens == expected[0, ids.shape[1] :].tolist()


def test_samples_do_not_depend_on_the_batch(tiny):
    prompts = [tiny.prompt(text) for text in TEXTS]
    decoding = Decoding(6, temperature=1.0, seed=1)
    sampled = dict(continue_prompts(tiny, prompts, decoding))
    assert dict(continue_prompts(tiny, prompts, decoding, memory=1)) == sampled
    assert dict(continue_prompts(tiny, prompts, Decoding(6, temperature=1.0, seed=2))) != sampled


def test_what_cannot_be_continued(tiny):
    prompts = [tiny.prompt(text) for text in TEXTS]
    with pytest.raises(PromptError, match="more than the window"):
        list(continue_prompts(tiny, [tiny.prompt("a " * 250)], Decoding(8)))
    with (
        without_a_number(tiny, tiny.prompt(TEXTS[3]).ids[1]),
        pytest.raises(RowError, match="row 3 failed: its logits are not finite"),
    ):
        list(continue_prompts(tiny, prompts, Decoding(2)))


def test_a_recurrent_model_is_checked_before_it_goes_on(tokenizer):
    mamba = random_model(MambaForCausalLM, MambaConfig, tokenizer, state_size=4)
    prompts = [mamba.prompt("The quick brown fox"), mamba.prompt("Amazon's former CEO attended")]
    spoken = dict(continue_prompts(mamba, prompts, Decoding(4)))
    assert [spoken[index] for index in range(2)] == [greedy(mamba, prompt.ids, 4) for prompt in prompts]
    with pytest.raises(PscopeError, match="there is no path 'stairs'"):
        list(continue_prompts(mamba, prompts, path="stairs"))


def test_a_list_of_prompts_is_needed(tiny):
    with pytest.raises(PscopeError, match="a list of prompts is needed, and 'a b' is none of them"):
        list(continue_prompts(tiny, "a b"))
