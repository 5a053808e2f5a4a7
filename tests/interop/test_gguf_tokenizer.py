"""Tokenizers in llama.cpp's terms, and what is refused because llama.cpp would read text otherwise."""

import json

import pytest

from maxlm.data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer
from maxlm.errors import ConfigError
from maxlm.interop.gguf_tokenizer import CONTROL, NORMAL, PATTERNS, UNUSED, USER_DEFINED, vocabulary
from tests.interop import ours


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(ours.tokenizer(tmp_path_factory.mktemp("tokenizer")))


def changed(tokenizer, **parts):
    """The tokenizer with parts of its tokenizer.json replaced, those of `model` one by one."""
    spec = json.loads(tokenizer.content)
    for name, part in parts.items():
        spec[name] = {**spec[name], **part} if name == "model" else part
    return Tokenizer("huggingface", json.dumps(spec).encode(), tokenizer.specials)


def splitting(pattern, **more):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False, **more}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, level]}


def test_every_id_has_its_token_and_kind(tokenizer):
    spec = json.loads(tokenizer.content)
    found = vocabulary(tokenizer, 310)
    assert (found.pre, found.add_bos, len(found.tokens), len(found.types)) == ("gpt-2", True, 310, 310)
    specials = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    for token, i in spec["model"]["vocab"].items():
        assert found.tokens[i] == token
        assert found.types[i] == (CONTROL if i in specials else NORMAL)
    assert found.types[300:] == [UNUSED] * 10
    assert len(set(found.tokens)) == 310
    assert [tuple(merge.split(" ")) for merge in found.merges] == [tuple(merge) for merge in spec["model"]["merges"]]
    word = {"id": 300, "content": "<tool>", "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": False}  # fmt: skip
    more = vocabulary(changed(tokenizer, added_tokens=[*spec["added_tokens"], word]), 310)
    assert (more.tokens[300], more.types[300]) == ("<tool>", USER_DEFINED)


def test_the_splittings_of_public_tokenizers_have_llama_cpps_names(tokenizer):
    for pattern, (name, ignores_merges) in PATTERNS.items():
        one = changed(tokenizer, pre_tokenizer=splitting(pattern), model={"ignore_merges": ignores_merges})
        assert vocabulary(one, 300).pre == name
        with pytest.raises(ConfigError, match="ignore_merges"):
            vocabulary(changed(one, model={"ignore_merges": not ignores_merges}), 300)


def test_a_tokenizer_that_adds_no_bos_is_written_so(tokenizer):
    assert not vocabulary(changed(tokenizer, post_processor=None), 300).add_bos


REFUSED = {
    "words split as nobody splits them": ({"pre_tokenizer": splitting(r"\d+")}, r"words split by \\d\+"),
    "a space in front of the text": (
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True, "trim_offsets": True}},
        "pre_tokenizer",
    ),
    "lower case": ({"normalizer": {"type": "Lowercase"}}, "the normalizer Lowercase"),
    "spaces as letters": (
        {"decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}}, "Metaspace"
    ),
    "merges left out at random": ({"model": {"dropout": 0.1}}, "dropout"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_read_otherwise_is_refused(case, tokenizer):
    parts, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        vocabulary(changed(tokenizer, **parts), 300)


def test_wordpiece_is_refused(tmp_path):
    config = TokenizerConfig(kind="wordpiece", vocab_size=60)
    with pytest.raises(ConfigError, match="WordPiece with the decoder WordPiece cannot be written"):
        vocabulary(train_tokenizer(["some words of text"] * 3, config, tmp_path, progress=False), 60)


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_chat_template_travels_with_the_tokenizer(place, tokenizer, tmp_path):
    template = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    tokenizer.save(tmp_path / "theirs")
    (tmp_path / "theirs" / "maxlm_tokenizer.json").unlink()
    if place.endswith(".json"):
        config = json.loads((tmp_path / "theirs" / place).read_text())
        (tmp_path / "theirs" / place).write_text(json.dumps(config | {"chat_template": template}))
    else:
        (tmp_path / "theirs" / place).write_text(template)
    load_tokenizer(tmp_path / "theirs").save(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert again.chat_template == template
    assert again.fingerprint == tokenizer.fingerprint
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())["chat_template"] == template
