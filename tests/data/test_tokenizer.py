import base64
import json
import pickle
import shutil
import string

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from maxlm.data.config import DataConfig, SourceConfig
from maxlm.data.tokenizer import TokenizerConfig, load_tokenizer, train_from_config, train_tokenizer
from maxlm.errors import ConfigError, DataError, StorageError
from tests.data.corpus import make_texts

TEXT = "def naïve(x):\n    return '日本 😀' + x  # tabs\t, nul \0 and\r\n\n  spaces   end \n"
SPECIAL = "before <|bos|> <|eos|> <|pad|> after"


@given(st.text())
def test_bpe_round_trips_any_text_and_counts_its_bytes(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.token_byte_lengths()[ids].sum()) == len(text.encode())


@given(st.text())
def test_special_tokens_are_never_read_out_of_text(tokenizer, text):
    ids = tokenizer.encode(f"{SPECIAL}{text}<|eos|>")
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids)
    assert tokenizer.decode(ids) == f"{SPECIAL}{text}<|eos|>"


def test_special_tokens_are_the_first_ids_and_stand_for_no_bytes(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (0, 1, 2, 300)
    lengths = tokenizer.token_byte_lengths()
    assert lengths.dtype.name == "int32"
    assert lengths[:3].tolist() == [0, 0, 0]
    assert lengths[3:].min() == 1


def test_decode_shows_special_tokens_when_asked(tokenizer):
    ids = [0, *tokenizer.encode("the store"), 1]
    assert tokenizer.decode(ids) == "the store"
    assert tokenizer.decode(ids, skip_specials=False) == "<|bos|>the store<|eos|>"


def test_batches_encode_as_texts_do(tokenizer, texts):
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_training_is_deterministic(kind, tmp_path):
    config = TokenizerConfig(kind=kind, vocab_size=400)
    first, second = (train_tokenizer(iter(make_texts(150)), config, tmp_path / n, progress=False) for n in "ab")
    assert first.content == second.content
    assert first.fingerprint == second.fingerprint


def test_unigram_loses_nothing(tmp_path):
    trained = train_tokenizer(
        make_texts(100), TokenizerConfig(kind="unigram", vocab_size=400), tmp_path, progress=False
    )
    ids = trained.encode(TEXT)
    assert trained.decode(ids) == TEXT
    assert trained.exact_bytes
    assert int(trained.token_byte_lengths()[ids].sum()) == len(TEXT.encode())


def test_wordpiece_says_that_its_bytes_are_not_exact(tmp_path):
    trained = train_tokenizer(
        make_texts(100), TokenizerConfig(kind="wordpiece", vocab_size=400), tmp_path, progress=False
    )
    assert not trained.exact_bytes
    assert trained.decode(trained.encode("the store of tokens")) == "the store of tokens"
    added = [token["content"] for token in json.loads(trained.content)["added_tokens"]]
    assert added == ["<|bos|>", "<|eos|>", "<|pad|>", "<|unk|>"]
    assert load_tokenizer(tmp_path).fingerprint == trained.fingerprint


def test_saved_folder_loads_again(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "maxlm_tokenizer.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == ("<|bos|>", "<|eos|>", "<|pad|>")


def test_transformers_begins_a_prompt_as_documents_begin(tokenizer):
    # What PreTrainedTokenizerFast runs: the post-processor of tokenizer.json.
    from tokenizers import Tokenizer

    ids = Tokenizer.from_str(tokenizer.content.decode()).encode("def ").ids
    assert ids == [tokenizer.bos_id, *tokenizer.encode("def ")]


def test_tokenizer_travels_between_processes(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint
    assert copy.encode(TEXT) == tokenizer.encode(TEXT)


def test_names_of_special_tokens_come_from_the_config_when_it_names_others(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(TokenizerConfig(path=str(tmp_path), bos="<|pad|>", pad=None))
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (2, 1, None)
    assert loaded.fingerprint != tokenizer.fingerprint
    with pytest.raises(DataError, match=r"tokenizer\.bos is '<s>', which is not in its vocabulary"):
        load_tokenizer(TokenizerConfig(path=str(tmp_path), bos="<s>"))


def test_hugging_face_folder_names_its_own_special_tokens(tokenizer, tmp_path):
    content = tokenizer.content.decode().replace("<|bos|>", "<s>").replace("<|eos|>", "</s>")
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>"}))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (0, 1, 2)
    assert loaded.specials["bos"] == "<s>"


def test_truncation_in_a_tokenizer_json_is_not_obeyed(tokenizer, tmp_path):
    spec = json.loads(tokenizer.content)
    spec["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert load_tokenizer(tmp_path).encode(TEXT) == tokenizer.encode(TEXT)


def test_normalizing_tokenizers_have_no_exact_bytes(tokenizer, tmp_path):
    spec = json.loads(tokenizer.content)
    spec["normalizer"] = {"type": "NFC"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert not load_tokenizer(tmp_path).exact_bytes


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text").write_text("\n".join(make_texts(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "m"), vocab_size=320, byte_fallback=True, minloglevel=2
    )
    return folder / "m.model"


def test_sentencepiece_model_loads(sentencepiece_model, tmp_path):
    loaded = load_tokenizer(sentencepiece_model)
    ids = loaded.encode("the store of tokens é ☃")
    assert loaded.decode(ids) == "the store of tokens é ☃"
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (1, 2, None)
    assert not loaded.exact_bytes
    lengths = loaded.token_byte_lengths()
    assert int(lengths[ids].sum()) == len(" the store of tokens é ☃".encode()), "a space is put in front"
    assert lengths[:3].tolist() == [0, 0, 0]
    assert loaded.decode([1, *ids, 2], skip_specials=False).startswith("<s>")
    loaded.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == loaded.fingerprint
    assert pickle.loads(pickle.dumps(loaded)).encode(TEXT) == loaded.encode(TEXT)


def write_tiktoken(path, merges=("th", "the", "st")):
    tokens = [bytes([byte]) for byte in range(256)] + [merge.encode() for merge in merges]
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return path


def test_tiktoken_file_loads(tmp_path):
    loaded = load_tokenizer(write_tiktoken(tmp_path / "cl100k_base.tiktoken"))
    ids = loaded.encode("the store <|bos|>")
    assert ids[0] == 257
    assert loaded.decode(ids) == "the store <|bos|>"
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id, loaded.vocab_size) == (259, 260, 261, 262)
    assert int(loaded.token_byte_lengths()[ids].sum()) == len(b"the store <|bos|>")
    loaded.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.fingerprint == loaded.fingerprint
    assert again.encode(TEXT) == loaded.encode(TEXT)
    assert again.decode(again.encode(TEXT)) == TEXT


def test_tiktoken_format_is_known_by_its_content(tmp_path):
    path = write_tiktoken(tmp_path / "tokenizer.model")
    with pytest.raises(DataError, match=r"tokenizer\.pattern"):
        load_tokenizer(path)
    loaded = load_tokenizer(TokenizerConfig(path=str(path), pattern=r"\S+|\s+"))
    assert loaded.backend == "tiktoken"


def damage(folder, case):
    path = folder / "tokenizer.json"
    if case == "cut off":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif case == "not JSON":
        path.write_bytes(b"\x80\x04\x95 a pickle")
    elif case == "empty":
        path.write_bytes(b"")
    elif case == "edited":
        path.write_text(path.read_text().replace('"add_prefix_space": false', '"add_prefix_space": true'))
    elif case == "other JSON":
        path.write_text("[1, 2]")
    elif case == "bad sidecar":
        path = folder / "maxlm_tokenizer.json"
        path.write_text("{")
    elif case == "gone":
        path = folder
        shutil.rmtree(folder)
    return path


@pytest.mark.parametrize("case", ["cut off", "not JSON", "empty", "edited", "other JSON", "bad sidecar", "gone"])
def test_damaged_tokenizer_is_refused_by_name(tokenizer, tmp_path, case):
    tokenizer.save(tmp_path / "saved")
    path = damage(tmp_path / "saved", case)
    with pytest.raises(DataError) as error:
        load_tokenizer(tmp_path / "saved")
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", b"\x0a\x0e\x0a\x05<unk", "not a SentencePiece model"),
        ("o200k_base.tiktoken", b"IQ== 0\nnot base64\n", "tiktoken:2"),
        ("o200k_base.tiktoken", b"IQ== 0\n", "has no rank"),
        ("o200k_base.tiktoken", b"\x00\x01", "line 1"),
        ("notes.txt", b"hello", "no tokenizer here"),
    ],
)
def test_files_that_are_no_tokenizer_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load_tokenizer(tmp_path / name)
    assert name in str(error.value)


def test_folder_without_tokenizer_and_path_not_set_are_refused(tmp_path):
    with pytest.raises(DataError, match="no tokenizer here"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"tokenizer\.path is not set"):
        load_tokenizer(TokenizerConfig())


def test_training_refuses_what_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer\.vocab_size is 100"):
        train_tokenizer(["text"], TokenizerConfig(vocab_size=100), tmp_path)
    with pytest.raises(ConfigError, match="both left out"):
        train_tokenizer(["text"], TokenizerConfig(bos=None, eos=None), tmp_path)
    with pytest.raises(DataError, match="no documents"):
        train_tokenizer([], TokenizerConfig(vocab_size=300), tmp_path, progress=False)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file"):
        train_tokenizer(["text"], TokenizerConfig(vocab_size=300), tmp_path / "file" / "sub", progress=False)


def test_training_leaves_heldout_documents_out(tmp_path):
    for letter in string.ascii_uppercase:
        (tmp_path / f"{letter}.txt").write_text(f"{letter * 40} " * 20)
    data = DataConfig(sources=(SourceConfig(kind="text", paths=(str(tmp_path),)),), heldout_fraction=0.5)
    config = TokenizerConfig(path=str(tmp_path / "tokenizer"), vocab_size=400)
    trained = train_from_config(config, data, progress=False)
    learned = {letter for letter in string.ascii_uppercase if len(trained.encode(letter * 8)) < 8}
    assert 5 < len(learned) < 21, "about half of the documents were seen"
