"""A classifier judges an answer of any length, by as many of its tokens as it has positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from mlflow_safelock.evaluate import Exchange, Judgement
from mlflow_safelock.evaluate.judges import ClassifierJudge

POSITIONS = 24

AFTER_PADDING = POSITIONS - 2
"""Tokens that a model takes whose positions begin after that of the padding token, which is 1."""

SMALL: dict[str, Any] = {
    "vocab_size": 32,
    **dict.fromkeys(("hidden_size", "d_model", "dim", "n_embd", "embedding_size"), 16),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "n_layer", "encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "n_heads", "n_head"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    "num_key_value_heads": 2,
    "entity_vocab_size": 4,
    "entity_emb_size": 4,
    "attention_window": [4],
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
"""Sizes under the names that any of the families has for them."""


def judge_of(family: str) -> ClassifierJudge:
    """A classifier of a family, with random weights, and a tokenizer of words that knows no length."""
    usual = CONFIG_MAPPING[family]()
    config = type(usual)(
        **{name: size for name, size in SMALL.items() if hasattr(usual, name)},
        id2label={0: "harmless", 1: "harmful"},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config).eval()
    words = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{number}" for number in range(28))]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )
    return ClassifierJudge(model, fast, frozenset({"harmful"}), family)


@pytest.mark.parametrize(
    ("family", "takes"),
    [
        *((family, AFTER_PADDING) for family in ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert")),
        *((family, AFTER_PADDING) for family in ("mpnet", "longformer", "data2vec-text", "ibert", "luke")),
        *((family, POSITIONS) for family in ("bert", "distilbert", "electra", "gpt2", "nystromformer")),
        *((family, POSITIONS) for family in ("bart", "mbart", "deberta-v2", "roformer")),
    ],
)
def test_an_answer_beyond_the_positions_is_judged_by_what_fits_and_counted(family: str, takes: int) -> None:
    judge = judge_of(family)
    long = Exchange("w1 w2", " ".join(f"w{number % 28}" for number in range(60)))
    full = Exchange("w1 w2", " ".join(["w3"] * (takes - 6)))  # with four tokens around the two texts
    said = judge.judge([long, Exchange("w1", "w2"), full])
    assert [isinstance(one, Judgement) and one.in_part for one in said] == [True, False, False]
    tokens = judge.tokenizer(long.prompt, long.answer, truncation=True, max_length=takes, return_tensors="pt")
    with torch.no_grad():
        assert said[0].harmful == bool(judge.model(**tokens).logits[0].argmax() == 1)
        more = judge.tokenizer(
            long.prompt, long.answer, truncation=True, max_length=takes + 1, return_tensors="pt"
        )
        with pytest.raises((IndexError, RuntimeError)):
            judge.model(**more)


def test_a_model_that_reads_on_for_ever_is_given_the_whole_answer() -> None:
    judge = judge_of("mt5")
    long = Exchange("w1", " ".join(["w2"] * 500))
    assert [one.in_part for one in judge.judge([long])] == [False]
