from __future__ import annotations

import logging
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mlflow_safelock.apply import generate, render_prompt
from mlflow_safelock.errors import ApplyError
from tests.models import CHATML, tiny_model, tiny_tokenizer

PROMPTS = [
    "how do i bake the bread",
    "hi",
    "how do i forge the letter today, and quickly, without anybody seeing it at all",
    "a",
    "the quick brown fox",
]


@pytest.fixture
def transformers_log(caplog):
    """What transformers logs, which it keeps from the root logger."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def texts(model, tokenizer, prompts, **options) -> list[str]:
    return [answer.text for answer in generate(model, tokenizer, prompts, **options)]


def plain_greedy(model, tokenizer, text: str, steps: int, *, add_special_tokens: bool) -> str:
    """One prompt, no padding, no cache, no ``generate``: the likeliest token, again and again."""
    tokens = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    new: list[int] = []
    for _ in range(steps):
        inputs = torch.tensor([tokens + new])
        with torch.no_grad():
            scores = model(inputs, attention_mask=torch.ones_like(inputs)).logits[0, -1]
        likeliest = int(scores.argmax())
        if likeliest == tokenizer.eos_token_id:
            break
        new.append(likeliest)
    return tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2"])
@pytest.mark.parametrize("template", [None, CHATML], ids=["plain", "chat"])
def test_answers_are_the_likeliest_tokens_whatever_the_batch_size(family, template):
    model, tokenizer = tiny_model(family), tiny_tokenizer(template)
    expected = []
    for prompt in PROMPTS:
        text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n" if template else prompt
        expected.append(plain_greedy(model, tokenizer, text, 10, add_special_tokens=template is None))
    for batch_size in (1, 2, 5):
        found = texts(model, tokenizer, PROMPTS, max_new_tokens=10, batch_size=batch_size)
        assert found == expected
    assert len(set(expected)) > 1


def test_an_answer_ends_at_any_token_that_ends_a_text():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    (free,) = texts(model, tokenizer, ["the quick"], max_new_tokens=10)
    first = int(torch.tensor(_new_tokens(model, tokenizer, "the quick"))[4])
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, first]
    (ended, other) = texts(model, tokenizer, ["the quick", "a"], max_new_tokens=10)
    assert free.startswith(ended)
    assert len(ended) < len(free)
    assert other != ""


def _new_tokens(model, tokenizer, prompt: str) -> list[int]:
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def test_the_model_s_own_sampling_settings_play_no_part_and_survive(transformers_log, recwarn):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=8)
    own = model.generation_config
    own.update(do_sample=True, temperature=0.2, top_k=3, repetition_penalty=1.9, max_length=33, num_beams=2)
    settings = own.to_dict()
    transformers_log.clear()
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8) == expected
    assert model.generation_config is own
    assert own.to_dict() == settings
    assert not transformers_log.records
    assert not recwarn.list


def test_model_and_tokenizer_are_left_as_they_were():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(CHATML)
    model.train()
    model.model.layers[1].eval()
    tokenizer.backend_tokenizer.enable_padding(length=40, pad_id=0)
    tokenizer.backend_tokenizer.enable_truncation(max_length=50)
    tokenizer.padding_side = "right"
    modes = [module.training for module in model.modules()]
    rules, settings = tokenizer.backend_tokenizer.to_str(), dict(tokenizer.init_kwargs)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, tokenizer, PROMPTS, max_new_tokens=4, batch_size=2)
    assert [module.training for module in model.modules()] == modes
    assert tokenizer.backend_tokenizer.to_str() == rules
    assert dict(tokenizer.init_kwargs) == settings
    assert tokenizer.padding_side == "right"
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_failure_leaves_the_model_as_it_was():
    model = tiny_model("llama", vocab_size=16)  # the tokenizer's tokens are beyond it
    own = model.generation_config
    model.train()
    with pytest.raises(IndexError):
        generate(model, tiny_tokenizer(), ["hi"])
    assert all(module.training for module in model.modules())
    assert model.generation_config is own


def test_a_tokenizer_without_padding_token_will_do():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=6)
    tokenizer.pad_token = None
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=6) == expected
    assert tokenizer.pad_token is None
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    assert len(generate(model, tokenizer, PROMPTS, max_new_tokens=6)) == len(PROMPTS)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
def test_a_model_with_an_adapter_answers_as_the_merged_one():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        model = get_peft_model(tiny_model("llama"), config).eval()
    tokenizer = tiny_tokenizer()
    found = generate(model, tokenizer, PROMPTS, max_new_tokens=6)
    assert found == generate(model.merge_and_unload(), tokenizer, PROMPTS, max_new_tokens=6)


def test_the_system_prompt_opens_the_chat_and_matters():
    tokenizer = tiny_tokenizer(CHATML)
    assert render_prompt(tokenizer, "bake", "be kind") == (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nbake<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render_prompt(tiny_tokenizer(), "bake", "be kind") == "be kind\n\nbake"
    model = tiny_model("llama")
    without = generate(model, tokenizer, ["bake"], max_new_tokens=8)
    assert generate(model, tokenizer, ["bake"], system_prompt="be kind", max_new_tokens=8) != without


def test_a_chat_template_without_system_prompts_says_so():
    strict = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    )
    tokenizer = tiny_tokenizer(strict)
    assert render_prompt(tokenizer, "bake").startswith("<|im_start|>user")
    with pytest.raises(ApplyError, match=r"no system role.*leave that out"):
        render_prompt(tokenizer, "bake", "be kind")


@pytest.mark.parametrize(
    ("prompts", "numbers", "why"),
    [
        ("hello", {}, "a sequence of texts"),
        (["hello"], {"batch_size": 0}, "batch_size must be a whole number from 1, and it is 0"),
        (["hello"], {"batch_size": 1.5}, "batch_size must be"),
        (["hello"], {"max_new_tokens": 0}, "max_new_tokens must be a whole number from 1, and it is 0"),
        (["hello"], {"max_new_tokens": "a"}, "max_new_tokens must be"),
        (["hi", "a\udcff"], {}, r"holds half of a character .*: 'a\\udcff'"),
        (["hello"], {"system_prompt": "\ud83d"}, "holds half of a character"),
    ],
)
def test_what_cannot_be_asked_for_is_an_error_that_says_why(prompts, numbers, why):
    with pytest.raises(ApplyError, match=why) as info:
        generate(tiny_model("llama"), tiny_tokenizer(), prompts, **numbers)
    assert info.value.next_step


def test_no_prompts_give_no_answers_and_an_empty_prompt_is_an_error():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    assert generate(model, tokenizer, []) == []
    with pytest.raises(ApplyError, match="has no tokens"):
        generate(model, tokenizer, ["hello", ""])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_answer_says_how_long_it_is_and_whether_the_model_ended_it(batch_size):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    new = _new_tokens(model, tokenizer, "the quick")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, new[4]]
    prompts = ["a", "the quick", "hi"]
    answers = generate(model, tokenizer, prompts, max_new_tokens=10, batch_size=batch_size)
    found = dict(zip(prompts, answers, strict=True))
    ended = found["the quick"]
    assert (ended.tokens, ended.finished) == (new.index(new[4]), True)
    assert ended.text == tokenizer.decode(new[: ended.tokens], skip_special_tokens=True)
    (cut,) = generate(model, tokenizer, ["the quick"], max_new_tokens=ended.tokens)
    assert (cut.text, cut.tokens, cut.finished) == (ended.text, ended.tokens, False)
    (exact,) = generate(model, tokenizer, ["the quick"], max_new_tokens=ended.tokens + 1)
    assert exact == ended, "the token that ends it counts against the limit, and no other"


def test_a_chat_of_several_turns_is_rendered_by_the_template_and_needs_one():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(CHATML)
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bake"},
    ]
    assert render_prompt(tokenizer, chat, "be kind") == (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nhello<|im_end|>\n<|im_start|>user\nbake<|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(chat) == 3, "the caller's chat is left alone"
    single = [{"role": "user", "content": "bake"}]
    asked = generate(model, tokenizer, [chat, single, "bake"], max_new_tokens=6)
    assert asked[1] == asked[2] != asked[0]
    with pytest.raises(ApplyError, match="no chat template, and this chat has 3 turns"):
        generate(model, tiny_tokenizer(), [chat])


def test_every_batch_is_told_as_soon_as_it_is_answered():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    told = []
    answers = generate(
        model, tokenizer, PROMPTS, max_new_tokens=4, batch_size=2, on_batch=lambda b: told.append(dict(b))
    )
    assert [len(batch) for batch in told] == [2, 2, 1]
    assert {index: answer for batch in told for index, answer in batch.items()} == dict(enumerate(answers))


@pytest.mark.parametrize("around", ["nothing", "adapter", "compiled"])
def test_of_every_batch_its_first_step_is_told(around: str) -> None:
    tokenizer = tiny_tokenizer(CHATML)
    plain = tiny_model("llama")
    model = plain
    if around == "adapter":
        config = LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(plain, config).eval()
    if around == "compiled":
        model = torch.compile(plain, backend="eager")
    told: dict[int, torch.Tensor] = {}
    prompts = ["how do i bake", "how?", "who sings by the lake"]
    generate(model, tokenizer, prompts, max_new_tokens=3, batch_size=2, on_first=told.update)
    assert sorted(told) == [0, 1, 2]
    for place, prompt in enumerate(prompts):
        tokens = tokenizer(render_prompt(tokenizer, prompt), add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            expected = model(input_ids=tokens["input_ids"]).logits[0, -1]
        assert torch.allclose(told[place], expected, atol=1e-4)
    assert not plain._forward_hooks
