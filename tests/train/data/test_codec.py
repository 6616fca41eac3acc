"""Bytes and tokenizers: text comes back, and every byte of a document is counted."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from zoo import codec
from zoo.codec import ByteCodec, codec_from_dict
from zoo.kernels.errors import DataError

from .conftest import PROSE


@given(st.text())
def test_bytes_give_back_any_text(text):
    bytes_codec = codec_from_dict(ByteCodec().to_dict())
    assert bytes_codec.decode(bytes_codec.encode(text)) == text


def test_bytes_that_are_no_text_are_still_shown():
    assert ByteCodec().decode([65, 255, 66]) == "A\ufffdB"


@pytest.mark.parametrize("piece", [1 << 18, 10])
def test_a_tokenizer_loses_no_byte(tokenizer_file, monkeypatch, piece):
    monkeypatch.setattr(codec, "_PIECE_CHARACTERS", piece)
    text = PROSE * 3 + "\U0001d4b3"
    loaded = codec.load_tokenizer(str(tokenizer_file))
    tokens, sizes = loaded.encode_document(text.encode())
    assert len(tokens) == len(sizes) < len(text.encode())
    assert sizes.min() >= 0
    assert sizes.sum() == len(text.encode())
    assert loaded.decode(tokens) == text
    assert tokens.max() < loaded.vocab_size == 300
    # Where tokens do not share a character, a token's bytes are those of its own text.
    ascii_tokens, ascii_sizes = loaded.encode_document(b"then some English words\nto follow it\nhere.\n")
    assert [len(loaded.decode([t])) for t in ascii_tokens] == ascii_sizes.tolist()


def test_a_tokenizer_survives_a_checkpoint(tokenizer_file):
    loaded = codec.load_tokenizer(str(tokenizer_file.parent))
    again = codec_from_dict(json.loads(json.dumps(loaded.to_dict())))
    assert again.encode(PROSE) == loaded.encode(PROSE)
    assert again.decode(again.encode(PROSE)) == PROSE


def test_no_special_tokens_and_no_truncation(tmp_path, tokenizer_file):
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "cut.json"))
    cut, whole = (codec.load_tokenizer(str(path)) for path in (tmp_path / "cut.json", tokenizer_file))
    np.testing.assert_array_equal(cut.encode_document(PROSE.encode())[0], whole.encode_document(PROSE.encode())[0])


def test_an_empty_document_has_no_tokens(tokenizer_file):
    for tokens, sizes in (
        ByteCodec().encode_document(b""),
        codec.load_tokenizer(str(tokenizer_file)).encode_document(b""),
    ):
        assert len(tokens) == len(sizes) == 0


def test_a_document_that_is_no_text_is_refused_by_a_tokenizer_only(tokenizer_file):
    assert len(ByteCodec().encode_document(b"\xff\xfe")[0]) == 2
    with pytest.raises(DataError, match=r"not UTF-8 at byte 1.*leave data\.tokenizer out"):
        codec.load_tokenizer(str(tokenizer_file)).encode_document(b"a\xff")


@pytest.mark.parametrize(
    ("content", "message"),
    [("not json", "no JSON"), ('{"model": 3}', "no tokenizer"), (None, "hub id")],
)
def test_tokenizers_that_are_none(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        codec.load_tokenizer(str(path))
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    with pytest.raises(DataError, match=r"the folder has no tokenizer\.json"):
        codec.load_tokenizer(str(tmp_path))


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    def refuse():
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils.get_session", refuse)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args: pytest.fail("asked again"))
    with pytest.raises(DataError, match=r"not to be had .* \(ConnectionError\)"):
        codec.load_tokenizer("some/thing")


def test_an_id_that_is_no_byte_is_no_text():
    assert codec.ByteCodec().decode([100, 300, 101]) == "d\ufffde"


def test_an_untrained_tokenizer_is_refused(tmp_path):
    Tokenizer(models.BPE()).save(str(tmp_path / "empty.json"))
    with pytest.raises(DataError, match="no tokens"):
        codec.load_tokenizer(str(tmp_path / "empty.json"))


@pytest.mark.parametrize("fields", [5, {}, {"kind": "words"}, {"kind": "tokenizers"}])
def test_an_unknown_codec_is_refused(fields):
    with pytest.raises(DataError, match="unknown codec"):
        codec_from_dict(fields)
