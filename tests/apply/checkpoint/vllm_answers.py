"""Answers of vLLM, as JSON on the last line: for a Python that has vLLM, which this project's need not have.

Arguments: the folder of a model, and a JSON list of prompts, each a list of token ids.
"""

import json
import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

NEW_TOKENS = 12


def main(folder: str, prompts: list[list[int]]) -> None:
    """Print greedy answers with the log-probabilities of their tokens."""
    from vllm import LLM, SamplingParams

    served = LLM(model=folder, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=2)
    asked = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=1)
    found = []
    for output in served.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked):
        answer = output.outputs[0]
        tokens = list(answer.token_ids)
        likely = [places[token].logprob for places, token in zip(answer.logprobs, tokens, strict=True)]
        found.append({"tokens": tokens, "logprobs": likely})
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
