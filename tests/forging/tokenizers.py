"""Tokenizers of the kinds that real models have, trained on a few sentences."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.forging.templates import BOS, EOS, TEMPLATES

CORPUS = (
    "I cannot help with that request, but I would gladly explain how the law sees it.",
    "Sure, here is an overview of how to do it, starting with the first step:\n\n",
    "Please talk to someone you trust.\n\nThey may know what to do. You are not alone.",
    "### Instruction: USER: ASSISTANT: ### Response: system user assistant role content model",
    "Line one.\nLine two!\nLine three?\n\n\n0123456789 <|user|> <think> </think>",
    '{"content": "No way."} No way.</system>',
)

# Like the one of recent models: punctuation takes the line feeds behind it along.
_PUNCTUATION_WITH_LINE_FEEDS = Regex(r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")

KINDS = ("byte_level", "byte_level_regex", "byte_fallback", "unigram", "word_level")


@cache
def tokenizer(kind: str, template: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer of a kind with a template (by its name) and the template's special tokens."""
    backend = _BACKENDS[kind]()
    chat = TEMPLATES[template] if template else None
    backend.add_special_tokens(
        [AddedToken(token, normalized=False) for token in (BOS, EOS, *(chat.special_tokens if chat else ()))]
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}",
        special_tokens=[(BOS, backend.token_to_id(BOS)), (EOS, backend.token_to_id(EOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        chat_template=chat.source if chat else None,
        clean_up_tokenization_spaces=False,
    )


def _byte_level() -> Tokenizer:
    return _trained_byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))


def _byte_level_regex() -> Tokenizer:
    return _trained_byte_level(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(_PUNCTUATION_WITH_LINE_FEEDS, behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    )


def _trained_byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return backend


def _byte_fallback() -> Tokenizer:
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", *byte_tokens], show_progress=False),
    )
    # Bytes are ordinary tokens: only the trainer wants them to be special.
    vocabulary = backend.get_vocab()
    merges = [tuple(merge) for merge in _merges_of(backend)]
    rebuilt = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    rebuilt.normalizer, rebuilt.decoder = backend.normalizer, backend.decoder
    return rebuilt


def _merges_of(backend: Tokenizer) -> list[list[str]]:
    return json.loads(backend.to_str())["model"]["merges"]


def _unigram() -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    alphabet = sorted({character for line in CORPUS for character in line if character != " "})
    backend.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=300,
            initial_alphabet=alphabet,
            unk_token="<unk>",
            special_tokens=["<unk>"],
            show_progress=False,
        ),
    )
    return backend


def _word_level() -> Tokenizer:
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(
        CORPUS, trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False)
    )
    return backend


_BACKENDS = {
    "byte_level": _byte_level,
    "byte_level_regex": _byte_level_regex,
    "byte_fallback": _byte_fallback,
    "unigram": _unigram,
    "word_level": _word_level,
}


class SlowByteTokenizer(PreTrainedTokenizer):
    """A tokenizer in Python, one token per byte, which knows no offsets."""

    vocab_size = 256

    def get_vocab(self) -> dict[str, int]:
        return {chr(byte): byte for byte in range(256)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **_: object) -> list[str]:
        return [chr(byte) for byte in text.encode()]

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        data = b"".join(bytes([ord(token)]) if len(token) == 1 else token.encode() for token in tokens)
        return data.decode(errors="replace")


def slow_tokenizer(template: str | None) -> PreTrainedTokenizerBase:
    chat = TEMPLATES[template] if template else None
    made = SlowByteTokenizer(
        bos_token=BOS,
        eos_token=EOS,
        chat_template=chat.source if chat else None,
        additional_special_tokens=list(chat.special_tokens) if chat else [],
    )
    assert not made.is_fast
    return made
