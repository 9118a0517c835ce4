"""A model with a table of positions reads as many tokens as that has; a prompt that needs more is refused."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from mlflow_safelock.apply import generate
from mlflow_safelock.apply.positions import position_limit
from mlflow_safelock.errors import ApplyError
from tests.models import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize(
    ("family", "limit"),
    [
        *((family, 256) for family in ("gpt2", "opt", "gpt_bigcode", "gpt_neo", "bert", "gptj", "mpt")),
        ("roberta", 255),
        *((family, None) for family in ("llama", "bloom", "xglm")),
    ],
)
def test_the_limit_is_the_longest_text_that_a_model_can_read(family: str, limit: int | None) -> None:
    model = tiny_model(family)
    assert position_limit(model) == limit
    with torch.no_grad():
        model(input_ids=torch.full((1, limit or 300), 5))
        if limit is not None:
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.full((1, limit + 1), 5))


def test_an_adapter_changes_nothing_and_a_tower_of_images_does_not_count() -> None:
    adapter = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM")
    assert position_limit(get_peft_model(tiny_model("gpt2"), adapter)) == 256
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = LlamaConfig(**small, vocab_size=32)
    images = SiglipVisionConfig(**small, image_size=16, patch_size=8)
    seeing = LlavaForConditionalGeneration(LlavaConfig(vision_config=images, text_config=text))
    assert any(name.endswith("position_embedding") for name, _ in seeing.named_modules())
    assert position_limit(seeing) is None


def test_tuned_prompts_take_positions_from_the_text() -> None:
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20)
    model = get_peft_model(tiny_model("gpt2"), settings).eval()
    assert position_limit(model) == 236
    with pytest.raises(ApplyError, match=r"takes 237 .* has 236"):
        generate(model, TOKENIZER, ["a" * 230], max_new_tokens=8)
    generate(model, TOKENIZER, ["a" * 229], max_new_tokens=8)


def test_a_smaller_table_within_the_decoder_is_that_of_something_else() -> None:
    model = tiny_model("llama")
    model.model.tower = torch.nn.Module()
    model.model.tower.position_embedding = torch.nn.Embedding(16, 8)
    assert position_limit(model) is None


@pytest.mark.parametrize("family", ["gpt2", "opt", "mpt"])
def test_a_prompt_that_does_not_fit_with_its_answer_is_refused_before_anything_is_generated(
    family: str,
) -> None:
    model = tiny_model(family)
    model.generation_config.eos_token_id = None
    fits = "a" * 249
    answers = generate(model, TOKENIZER, ["a", fits], max_new_tokens=8)
    assert answers[1].tokens == 8
    told: list[object] = []
    with pytest.raises(
        ApplyError, match=r"'a{60}' has 250 tokens .* 8 new ones takes 257 .* has 256\. .* at most 7 new"
    ):
        generate(model, TOKENIZER, ["a", fits + "a"], max_new_tokens=8, batch_size=1, on_batch=told.append)
    with pytest.raises(ApplyError, match=r"or leave it out"):
        generate(model, TOKENIZER, [[{"role": "user", "content": "a" * 257}]], max_new_tokens=1)
    assert not told


def test_a_model_that_works_positions_out_takes_any_length() -> None:
    (answer,) = generate(tiny_model("llama"), TOKENIZER, ["a" * 300], max_new_tokens=2)
    assert answer.tokens
