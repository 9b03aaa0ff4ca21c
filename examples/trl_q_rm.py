"""TRL's GRPO with token-level credit from a Q-RM, over packed rows.

    python examples/trl_q_rm.py --model MODEL --q_rm Q_RM --data prompts.jsonl --verifier math --out DIR

The policy learns from the Q-RM alone; the verifier's verdicts are TRL's reported reward. `prompts.jsonl` holds
{"instruction", "label"} rows. MODEL and Q_RM share a vocabulary; `qrm-fast train-rm` makes the latter.
"""

import argparse
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from qrm_fast.integrations.trl import PackedForward, QRMCredit, TokenCredit
from qrm_fast.rl.verifiers import find_verifier, read_examples


class Trainer(TokenCredit, PackedForward, GRPOTrainer):
    """GRPO whose advantages are the Q-RM's, token by token, and whose forward passes hold no padding."""


def train(model: str, q_rm: str, data: str, out: str, verifier: str, **options: Any) -> Trainer:
    """Train `model`; `options` are GRPOConfig's."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    is_right = find_verifier(verifier)

    def right(completions: list[str], label: list[str], **_: Any) -> list[float]:
        return [float(is_right(text, wanted)) for text, wanted in zip(completions, label, strict=True)]

    rows = [{"prompt": str(example.instruction), "label": example.label} for example in read_examples(data, verifier)]
    trainer = Trainer(
        model=model,
        args=GRPOConfig(output_dir=out, **options),
        reward_funcs=right,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        credit=QRMCredit(q_rm, tokenizer),
    )
    trainer.train()
    trainer.save_model(out)
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "q_rm", "data", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--verifier", default="math")
    train(**vars(parser.parse_args()))
