"""Chat templates in the shapes that real models have, with the special tokens each of them writes."""

from __future__ import annotations

from dataclasses import dataclass

BOS, EOS = "<s>", "</s>"


@dataclass(frozen=True)
class Template:
    source: str
    special_tokens: tuple[str, ...] = ()


TEMPLATES = {
    # Headers around roles, contents trimmed, a token that ends the turn.
    "llama3": Template(
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    # Brackets, the system prompt inside the user's turn, and a blank before the answer and its end.
    "mistral": Template(
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] ~ '\n\n' %}"
        "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
        "{{ bos_token }}{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must take turns') }}{% endif %}{% if m['role'] == 'user' %}"
        "[INST] {{ system if loop.first else '' }}{{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}",
        ("[INST]", "[/INST]"),
    ),
    # A default system prompt, a line feed after the token that ends the turn.
    "chatml": Template(
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help where you can.<|im_end|>\n"
        "{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
    ),
    # No system role; the assistant is called model.
    "gemma": Template(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
        "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
        "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}",
        ("<start_of_turn>", "<end_of_turn>"),
    ),
    # Roles in plain text that the tokenizer takes apart, the end-of-text token behind every turn.
    "zephyr": Template(
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    ),
    "vicuna": Template(
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }} "
        "{% elif m['role'] == 'user' %}USER: {{ m['content'] }} "
        "{% else %}ASSISTANT: {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    # The answer is closed by nothing but line feeds.
    "alpaca": Template(
        "{% for m in messages %}{% if m['role'] == 'user' %}### Instruction:\n{{ m['content'] }}\n\n"
        "{% elif m['role'] == 'assistant' %}### Response:\n{{ m['content'] }}\n\n"
        "{% else %}{{ m['content'] }}\n\n{% endif %}{% endfor %}"
    ),
    # Wide bars in its tokens; what comes before the end of a train of thought is cut off the answer.
    "deepseek": Template(
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<｜User｜>{{ m['content'] }}"
        "{% elif m['role'] == 'assistant' %}<｜Assistant｜>{{ m['content'].split('</think>')[-1] }}"
        "<｜end｜>{% else %}{{ m['content'] }}{% endif %}{% endfor %}",
        ("<｜User｜>", "<｜Assistant｜>", "<｜end｜>"),
    ),
    "phi": Template(
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}{{ eos_token }}",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    # The train of thought gets a place of its own, which is there even where there is none.
    "thinking": Template(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% if '</think>' in m['content'] %}"
        "{% set thought = m['content'].split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set content = m['content'].split('</think>')[-1].lstrip('\n') %}"
        "{% else %}{% set thought = '' %}{% set content = m['content'] %}{% endif %}"
        "<think>\n{{ thought }}\n</think>\n\n{{ content }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n"
        "{% endfor %}",
        ("<|im_start|>", "<|im_end|>"),
    ),
    # Contents as JSON strings.
    "json": Template(
        '{% for m in messages %}{"role": "{{ m[\'role\'] }}", "content": {{ m[\'content\'] | tojson }}}\n'
        "{% endfor %}"
    ),
    # Leaves a system prompt out without a word.
    "deaf": Template(
        "{% for m in messages if m['role'] != 'system' %}<{{ m['role'] }}>{{ m['content'] }}"
        "</{{ m['role'] }}>{% endfor %}"
    ),
}
