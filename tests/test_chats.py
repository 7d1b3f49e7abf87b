import copy

import pytest

from pscope import First, LanguageModel, PromptError

CHAT = [{"role": "user", "content": "Who leads Amazon?"}]


def test_a_chat_is_a_prompt_of_the_models_own_template(smollm2):
    messages = [*CHAT, {"role": "assistant", "content": "Its CEO"}]
    own = smollm2.tokenizer.apply_chat_template
    for given, begin, how in (
        (CHAT, True, {"add_generation_prompt": True}),
        (CHAT, False, {}),
        (messages, True, {"continue_final_message": True}),
        (messages, False, {}),
    ):
        prompt = smollm2.chat(given, "Amazon", begin=begin)
        assert list(prompt.ids) == own(given, tokenize=True, return_dict=False, **how)
        assert prompt.token == " Amazon"
    assert smollm2.chat(messages).token == " CEO"


def test_a_chat_has_one_start_token(tiny, bos_eos_tokenizer):
    tokenizer = copy.deepcopy(bos_eos_tokenizer)
    tokenizer.chat_template = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"
    prompt = LanguageModel(tiny.hf, tokenizer, "tiny").chat(CHAT)
    assert list(prompt.ids) == [1, *tokenizer("Who leads Amazon?", add_special_tokens=False).input_ids]


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([], "a chat is a list of messages"),
        ("Who?", "a chat is a list of messages"),
        (CHAT[0], "a chat is a list of messages"),
        ([{"role": "user"}], "a chat is a list of messages"),
    ],
)
def test_what_is_no_chat_is_told(smollm2, messages, told):
    with pytest.raises(PromptError, match=told):
        smollm2.chat(messages)


def test_a_template_that_is_missing_or_refuses_is_told(tiny):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    model = LanguageModel(tiny.hf, tokenizer, "tiny")
    tokenizer.chat_template = "{{ raise_exception('only users speak') }}"
    with pytest.raises(PromptError, match="the chat template of tiny cannot be filled in: only users speak"):
        model.chat(CHAT)
    tokenizer.chat_template = None
    with pytest.raises(PromptError, match="tiny has no chat template"):
        model.chat(CHAT)


def test_the_first_token_of_a_phrase(smollm2):
    text = "We saw the capital of Japan, the old one"
    prompt = smollm2.prompt(text, First("the capital of Japan"))
    assert (prompt.position, prompt.token) == (2, " the")
    assert smollm2.prompt(text, "the capital of Japan").token == " Japan"
    with pytest.raises(PromptError, match="'the' stands 2 times"):
        smollm2.prompt(text, First("the"))
