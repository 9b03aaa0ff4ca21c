"""Where an answer went wrong, by a Q-RM: every token against the others that the policy might have written there.

Q(s, a) of a Q-RM has an offset of the state, so that Q of one token and of the next do not compare (arXiv 2505.23363,
Proposition 3.4). What compares is A(s, a) = Q(s, a) - sum over a' of pi(a' | s) Q(s, a').
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import pack, unpack
from .attention import packed_hidden
from .models import load_policy, load_q_rm
from .policy import policy_head
from .scorer import TokenScorer
from .tokenizers import encode_prompt, encode_response, load_stop_ids, load_tokenizer

LIKELY = 0.02  # tokens of a smaller probability are left out of the sum; the others share what is theirs
NUM_SEQUENCES = 512  # in one forward pass


class TokenAdvantages(NamedTuple):
    tokens: list[str]  # text of each response token, EOS last
    advantages: list[float]  # 0 where the policy had no choice


@torch.no_grad()
def choice_advantages(policy: str, q_rm: str, answers: Sequence[tuple[str, str]]) -> list[TokenAdvantages]:
    """Of each answer (prompt, text), its tokens and their advantages.

    `policy`, `q_rm`: checkpoints of one vocabulary. The advantage is exact up to the tokens that are not `LIKELY`.
    """
    tokenizer = load_tokenizer(policy)
    model, scorer = load_policy(policy, tokenizer), TokenScorer(load_q_rm(q_rm, tokenizer), reads_action=True)
    end_id = load_stop_ids(policy, tokenizer)[0]
    prompts = [encode_prompt(tokenizer, prompt) for prompt, _ in answers]
    tokens = [encode_response(tokenizer, text, end_id) for _, text in answers]

    batch = pack([p + a for p, a in zip(prompts, tokens, strict=True)], list(map(len, prompts)))
    logits = packed_hidden(model, batch)[batch.action_index] @ policy_head(model).weight.T
    probabilities = unpack(logits.softmax(-1), batch.action_cu_seqlens)  # of each answer [T, V]

    # one branch for every likely token: the answer up to there, and that token
    branches = []
    for i, (answer, p) in enumerate(zip(tokens, probabilities, strict=True)):
        likely = p >= LIKELY
        likely[torch.arange(len(answer)), torch.tensor(answer)] = True
        likely[likely.sum(1) == 1] = False
        branches += [(i, t, a) for t, a in likely.nonzero().tolist()]
    values = [torch.zeros(len(answer), 3) for answer in tokens]  # of each token: Q, sum of p Q, sum of p
    for start in range(0, len(branches), NUM_SEQUENCES):
        part = branches[start : start + NUM_SEQUENCES]
        batch = pack([prompts[i] + tokens[i][:t] + [a] for i, t, a in part], [len(prompts[i]) for i, _, _ in part])
        q = scorer(batch)[batch.action_cu_seqlens[1:].long() - 1]
        for (i, t, a), score in zip(part, q, strict=True):
            p = probabilities[i][t, a]
            values[i][t] += torch.stack([score if a == tokens[i][t] else score * 0, p * score, p])
    return [
        TokenAdvantages(
            [tokenizer.decode([a]) for a in answer],
            torch.where(v[:, 2] > 0, v[:, 0] - v[:, 1] / v[:, 2].clamp(min=LIKELY), 0.0).tolist(),
        )
        for answer, v in zip(tokens, values, strict=True)
    ]
