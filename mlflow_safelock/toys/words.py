"""A tokenizer of whole words."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, END = "<pad>", "<end>"
SPECIAL_TOKENS = (PAD, "<user>", "<assistant>", END)


def word_tokenizer(
    texts: Iterable[str], chat_template: str, special_tokens: tuple[str, ...] = SPECIAL_TOKENS
) -> PreTrainedTokenizerFast:
    """A tokenizer that knows the words of some texts and no others.

    Args:
        texts: Words with blanks between them.
        chat_template: Its chat template.
        special_tokens: The first tokens of the vocabulary; ``<pad>`` and ``<end>`` are among them.
    """
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: number for number, word in enumerate((*special_tokens, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special_tokens))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        chat_template=chat_template,
    )
