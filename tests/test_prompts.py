import os

import pytest
from tokenizers.processors import ByteLevel, TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from pscope import Every, PromptError
from pscope.models.prompts import (
    ENTITY_DESCRIPTION,
    TOKEN_IDENTITY,
    Nearest,
    continuing_tokens,
    spoken_after,
    tokenize,
    written_out,
)

SPECIAL = [("<|endoftext|>", 0), ("<|im_start|>", 1), ("<|im_end|>", 2)]


def processed(tokenizer, processor, bos=None):
    """A copy of the tokenizer with another post-processor, which adds tokens or sets offsets."""
    copy = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    copy.post_processor = processor
    return PreTrainedTokenizerFast(tokenizer_object=copy, bos_token=bos, eos_token="<|im_end|>")


def test_tokens_are_the_tokenizers_own(tokenizer):
    prompt = tokenize(tokenizer, TOKEN_IDENTITY)
    assert list(prompt.ids) == tokenizer(TOKEN_IDENTITY).input_ids
    assert "".join(prompt.tokens) == TOKEN_IDENTITY
    assert prompt.token == "?"


def test_text_is_found_as_whole_tokens(tokenizer):
    text = "Amazon's former CEO attended the Oscars"
    assert tokenize(tokenizer, text, "CEO").token == " CEO"
    assert tokenize(tokenizer, text, " CEO").position == 3
    # Several tokens: the last one is meant.
    assert tokenize(tokenizer, text, "Oscars").position == 8
    assert tokenize(tokenizer, text, "former CEO attended").token == " attended"


def test_text_inside_a_longer_token_does_not_count(tokenizer):
    # "other" stands once as a token, and once inside " another".
    prompt = tokenize(tokenizer, "another day, other ways", "other")
    assert prompt.tokens[prompt.position] == " other"
    with pytest.raises(PromptError, match="only inside longer tokens"):
        tokenize(tokenizer, "Amazon's former CEO", "EO")


def test_of_several_places_the_nearest_is_read(tokenizer, bos_eos_tokenizer):
    # "art" is a word twice, and stands inside another.
    text = "cart art is art now"
    for tok, added in ((tokenizer, 0), (bos_eos_tokenizer, 1)):
        first, second = (
            index
            for index, (start, end) in enumerate(tok(text, return_offsets_mapping=True).offset_mapping)
            if text[start:end] == " art"
        )
        assert second == first + 2
        for index, character, expected in [
            (0, None, first), (1 + added, None, first), (99, None, second), (-1, None, second), (-99, None, first),
            (99, 3, first), (99, len("cart art"), first), (0, len("cart art is art"), second),
        ]:  # fmt: skip
            assert tokenize(tok, text, Nearest("art", index, character)).position == expected
    assert tokenize(tokenizer, text, ["is", Nearest("art", -1)]).positions == (second - 2, second - 1)
    with pytest.raises(PromptError, match="'ar' stands only inside longer tokens"):
        tokenize(tokenizer, text, Nearest("ar", 0))


def test_a_character_of_several_tokens_ends_at_its_last(tokenizer):
    prompt = tokenize(tokenizer, "in 東京 now", "東京")
    assert prompt.ids[prompt.position + 1 :] == tuple(tokenizer(" now").input_ids)


@pytest.mark.parametrize("at", [1.5, None, [0, 1.5], {"a"}])
def test_what_is_no_position(tokenizer, at):
    with pytest.raises(PromptError, match="is no position; give text of the prompt, an index, or a list of such"):
        tokenize(tokenizer, "a b c", at)


def test_indices(tokenizer):
    assert tokenize(tokenizer, "a b c", 1).position == 1
    assert tokenize(tokenizer, "a b c", -1).position == 2
    with pytest.raises(PromptError, match=r"position 3 is outside .* 0:'a' 1:' b' 2:' c'"):
        tokenize(tokenizer, "a b c", 3)


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("cat", r"stands 2 times in the prompt, at \[0, 2\].*0:'cat'"),
        ("dog", r"stands nowhere in the prompt; its tokens are 0:'cat' 1:' ->'"),
        ("", "nowhere"),
    ],
)
def test_text_that_is_missing_or_ambiguous_lists_the_tokens(tokenizer, at, message):
    with pytest.raises(PromptError, match=message):
        tokenize(tokenizer, "cat -> cat", at)


@pytest.mark.parametrize("text", ["", "  \n"])
def test_empty_prompt(tokenizer, text):
    with pytest.raises(PromptError, match="empty"):
        tokenize(tokenizer, text)


def test_bytes_that_are_not_utf_8(tokenizer):
    with pytest.raises(PromptError, match="the prompt 'caf.udce9' holds bytes that are not UTF-8"):
        tokenize(tokenizer, os.fsdecode(b"caf\xe9"))


def test_bos_is_added_once_and_eos_is_left_off(bos_eos_tokenizer):
    plain = tokenize(bos_eos_tokenizer, "hello there")
    assert plain.tokens == ("<|im_start|>", "hello", " there")
    assert plain.token == " there"
    assert tokenize(bos_eos_tokenizer, "<|im_start|>hello there").ids == plain.ids
    assert tokenize(bos_eos_tokenizer, "hello there", "hello").position == 1


def test_a_start_of_several_tokens_is_added_once(tokenizer):
    start = TemplateProcessing(single="<|endoftext|> <|im_start|> $A", special_tokens=SPECIAL)
    for bos in ("<|endoftext|>", "<|im_start|>", None):
        starting = processed(tokenizer, start, bos)
        plain = tokenize(starting, "hello there")
        assert plain.tokens == ("<|endoftext|>", "<|im_start|>", "hello", " there")
        assert tokenize(starting, "<|endoftext|><|im_start|>hello there").ids == plain.ids


def test_a_start_token_that_is_not_the_tokenizers_bos_is_added_once(tokenizer):
    starting = processed(tokenizer, TemplateProcessing(single="<|im_start|> $A", special_tokens=SPECIAL))
    assert tokenize(starting, "<|im_start|>hello").tokens == ("<|im_start|>", "hello")


def test_a_tokenizer_without_offsets_still_takes_indices():
    tokenizer = ByT5Tokenizer()
    assert tokenize(tokenizer, "abc").ids == tuple(tokenizer("abc", add_special_tokens=False).input_ids)
    assert tokenize(tokenizer, "abc", 1).token == "b"
    with pytest.raises(PromptError, match="ByT5Tokenizer tells no offsets"):
        tokenize(tokenizer, "abc", "b")


def test_words_written_out_in_the_place_of_the_marked_token(tokenizer, bos_eos_tokenizer):
    described = tokenize(tokenizer, ENTITY_DESCRIPTION)
    assert described.token == " x"
    assert written_out(described, "Diana, Princess of Wales").endswith("corporation, Diana, Princess of Wales")
    for tok in (tokenizer, bos_eos_tokenizer):
        # The marked x, not the first one.
        prompt = tokenize(tok, "tax x is x too", -2)
        assert prompt.token == " x"
        assert written_out(prompt, "New York") == "tax x is New York too"
    repeated = tokenize(tokenizer, "say x x x now, x", Every("x"))
    assert written_out(repeated, "New York") == "say New York now, New York"
    with pytest.raises(PromptError, match="nothing can be written in the place of token 0"):
        written_out(tokenize(bos_eos_tokenizer, "one x", 0), "a")
    with pytest.raises(PromptError, match="nothing can be written"):
        written_out(tokenize(ByT5Tokenizer(), "one x"), "a")


def test_the_tokens_that_go_on_after_a_prompt(tokenizer, bos_eos_tokenizer):
    for tok in (tokenizer, bos_eos_tokenizer):
        prompt = tokenize(tok, "The capital of x is")
        assert tok.convert_ids_to_tokens(list(continuing_tokens(tok, prompt, " Tokyo"))) == ["ĠTokyo"]
        assert tok.decode(continuing_tokens(tok, prompt, " Tokyo, of course")) == " Tokyo, of course"
    assert [spoken_after(tokenize(tokenizer, text), "Tokyo") for text in ("it is", "it is ")] == [" Tokyo", "Tokyo"]
    for text, fault in (("  \n", "is not tokenised as its continuation"), ("", "something in it"), (3, "not 3")):
        with pytest.raises(PromptError, match=fault):
            continuing_tokens(tokenizer, tokenize(tokenizer, "x  "), text)


def test_each_token_has_its_place_in_the_text(tokenizer, bos_eos_tokenizer):
    text = "say 東 x now"
    for tok in (tokenizer, bos_eos_tokenizer, processed(tokenizer, ByteLevel(trim_offsets=True))):
        prompt = tokenize(tok, text)
        assert len(prompt.spans) == len(prompt)
        for token, (start, end) in zip(prompt.tokens, prompt.spans, strict=True):
            assert text[start:end] == token or (start, end) == (0, 0)
    assert tokenize(ByT5Tokenizer(), "abc").spans == ()


def test_every_place_of_a_placeholder(tokenizer):
    text = "say x x x x x now, ax"
    assert tokenize(tokenizer, text, Every("x")).positions == (1, 2, 3, 4, 5)
    assert tokenize(tokenizer, text, [Every("x"), "now"]).positions == (1, 2, 3, 4, 5, 6)
    assert tokenize(tokenizer, text, Every("now")).positions == (6,)
    with pytest.raises(PromptError, match=r"stands 5 times in the prompt, at \[1, 2, 3, 4, 5\]; give one of these"):
        tokenize(tokenizer, text, "x")
    with pytest.raises(PromptError, match=r"or mark all of them: Every\('x'\), on the command line all:x"):
        tokenize(tokenizer, text, "x")
    with pytest.raises(PromptError, match="'dog' stands nowhere"):
        tokenize(tokenizer, text, Every("dog"))


@pytest.mark.parametrize("phrase", ["x x x x x", "x x", " x  x", "so so so"])
def test_a_word_repeated_is_not_taken_for_its_last_place(tokenizer, phrase):
    word = phrase.split()[0]
    for at in (phrase, Every(phrase)):
        with pytest.raises(PromptError, match=rf"is one word repeated; .* Every\('{word}'\), .* all:{word}"):
            tokenize(tokenizer, f"say {phrase.strip()} now", at)


def test_a_name_that_doubles_a_word_is_a_phrase(tokenizer):
    prompt = tokenize(tokenizer, "We saw Bora Bora then", "Bora Bora")
    assert (prompt.token, prompt.position) == (tokenize(tokenizer, "We saw Bora Bora").token, len(prompt) - 2)


def test_last_is_refused_where_it_is_a_word_of_the_text(tokenizer):
    text = "The last emperor of China"
    assert tokenize(tokenizer, text).token == " China"
    with pytest.raises(PromptError, match=r"'last' is a word of the prompt, at \[1\]; .* or -1 for the last token"):
        tokenize(tokenizer, text, "last")
    # Where both are the same token, or it is no word of its own, nothing can be mistaken.
    for clear in ("She came last", "ballast in the hold", "Last Supper"):
        assert tokenize(tokenizer, clear, "last").position == len(tokenize(tokenizer, clear)) - 1
    slow = ByT5Tokenizer()
    assert tokenize(slow, "abc", "last").position == 2
    with pytest.raises(PromptError, match="'last' is a word of the prompt"):
        tokenize(slow, "the last one", "last")


def test_whether_the_first_token_is_marked(tokenizer, bos_eos_tokenizer):
    assert tokenize(tokenizer, "Paris").at_sink
    assert tokenize(tokenizer, "Paris is far", "Paris").at_sink
    assert tokenize(tokenizer, "x is x", [2, 0]).at_sink
    assert not tokenize(tokenizer, "Paris is far").at_sink
    assert not tokenize(bos_eos_tokenizer, "Paris is far", "Paris").at_sink
    assert tokenize(bos_eos_tokenizer, "Paris is far", 0).at_sink


def test_one_text_is_needed(tokenizer):
    with pytest.raises(PromptError, match=r"a prompt is one text, not \['a', 'b'\]"):
        tokenize(tokenizer, ["a", "b"])


def test_a_prompt_is_told_in_a_line(tokenizer):
    assert repr(tokenize(tokenizer, "Amazon's former CEO", "CEO")) == "Prompt(\"Amazon's former CEO\" at 3:' CEO')"
    told = repr(tokenize(tokenizer, "x yes\n" * 50, [0, 2]))
    assert told.endswith("at 0:'x' 2:'\\n')")
    assert len(told) < 110


def test_several_positions(tokenizer):
    prompt = tokenize(tokenizer, "x x x now", [2, "now", 0])
    assert prompt.positions == (2, 3, 0)
    with pytest.raises(PromptError, match="3 positions of 'x x x now' are marked where one is needed"):
        prompt.token  # noqa: B018
    for twice in ([1, -3], []):
        with pytest.raises(PromptError, match="are none, or one of them twice: 0:'x' 1:' x'"):
            tokenize(tokenizer, "x x x now", twice)
