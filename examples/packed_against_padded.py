"""Log-probabilities of real answers, packed by this library against padded in transformers: how far apart are they?

    python examples/packed_against_padded.py --model MODEL --data pairs.jsonl

`pairs.jsonl` holds {"instruction", "chosen", ...} rows, of which the first 64 are read. Each side writes its prompts by
the chat template of the model; weights and activations are float32.
"""

import argparse
import time
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qrm_fast import pack, plan_microbatches
from qrm_fast.rl.data import Pair, Rows, read_rows
from qrm_fast.rl.gguf import checkpoint_of
from qrm_fast.rl.models import load_policy, num_token_ids
from qrm_fast.rl.policy import Policy
from qrm_fast.rl.tokenizers import encode_prompts, encode_responses, load_tokenizer


class Compared(NamedTuple):
    num_tokens: int  # prompts and answers
    num_padded: int  # the same with padding
    num_actions: int  # tokens of answers, whose log-probabilities are compared
    largest: float  # difference
    mean: float
    packed_s: float
    padded_s: float


@torch.no_grad()
def compare(model: str, data: str, num_answers: int = 64, batch_size: int = 8, max_tokens: int = 4096) -> Compared:
    rows = read_rows(data, Pair)
    rows = Rows(rows[:num_answers], rows.places[:num_answers])
    tokenizer = load_tokenizer(model)
    prompts = encode_prompts(tokenizer, rows)
    answers = encode_responses(tokenizer, rows, "chosen")
    lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
    policy = Policy(load_policy(model, tokenizer), num_ids=num_token_ids(tokenizer))
    packed = [torch.empty(0)] * len(rows)  # of each answer [T_s]
    start = time.perf_counter()
    for indices in plan_microbatches(lengths, max_tokens=max_tokens)[0]:
        batch = pack([prompts[i] + answers[i] for i in indices], [len(prompts[i]) for i in indices])
        for i, part in zip(indices, policy(batch).logprobs.split([len(answers[i]) for i in indices]), strict=True):
            packed[i] = part
    packed_s = time.perf_counter() - start

    plain = AutoTokenizer.from_pretrained(checkpoint_of(model), padding_side="right")
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint_of(model), dtype=torch.float32)
    chats = [[{"role": "user", "content": row.instruction}] for row in rows]
    asked = [plain.apply_chat_template(x, add_generation_prompt=True, return_dict=True)["input_ids"] for x in chats]
    padded, num_padded = [], 0
    start = time.perf_counter()
    for bos in range(0, len(rows), batch_size):
        chunk = range(bos, min(bos + batch_size, len(rows)))
        texts = plain.pad({"input_ids": [asked[i] + answers[i] for i in chunk]}, return_tensors="pt")
        logprobs = theirs(**texts).logits.log_softmax(-1)  # [B, L, V]
        num_padded += texts["input_ids"].numel()
        for i, row in zip(chunk, logprobs, strict=True):
            before = torch.arange(len(answers[i])) + len(asked[i]) - 1
            padded.append(row[before, torch.tensor(answers[i])])
    padded_s = time.perf_counter() - start

    distance = (torch.cat(packed) - torch.cat(padded)).abs()
    counts = (sum(lengths), num_padded, len(distance))
    return Compared(*counts, distance.max().item(), distance.mean().item(), packed_s, padded_s)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data"):
        parser.add_argument(f"--{name}", required=True)
    for name, value in compare(**vars(parser.parse_args()))._asdict().items():
        print(f"{name:12}{value:12,d}" if isinstance(value, int) else f"{name:12}{value:12.3g}")
