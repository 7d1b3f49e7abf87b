import json
import os
import unicodedata

from pscope.characters import has_surrogates, visible


def test_what_steers_a_terminal_is_shown_instead():
    assert visible("\x1b]0;title\x07") == "\\u001b]0;title\\u0007"
    assert visible("abc\u202ecba\u2066\x9b1m\r") == "abc\\u202ecba\\u2066\\u009b1m\\u000d"
    everything = "".join(map(chr, range(0x110000)))
    left = [character for character in visible(everything) if character not in "\n\t"]
    turning = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    assert not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in left)
    assert not any(unicodedata.bidirectional(character) in turning for character in left)


def test_ordinary_text_stays():
    text = "東京 café e\u0301 שלום \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 👩\u200d🚀 a\tb\nc [bold] \\ $"
    assert visible(text) == text


def test_json_remains_the_same_json():
    told = {"a\u202e": "\x7f \x85 \u2028 \x1b"}
    shown = visible(json.dumps(told, ensure_ascii=False, indent=2))
    assert json.loads(shown) == told
    assert not any(character in shown for character in "\u202e\x7f\x85\u2028")


def test_bytes_that_are_not_utf_8_are_found():
    assert has_surrogates(os.fsdecode(b"caf\xe9"))
    assert not has_surrogates("café 👩\u200d🚀")
