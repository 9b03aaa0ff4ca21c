"""Call every public function once, and walk every gradient: `python tests/every_op.py`, the modules it loaded out.

What a user of the ops alone runs: test_dependencies.py starts it where nothing but the base dependencies is installed.
"""

import sys

import torch

import qrm_fast

T, S, K, D, V = 6, 2, 4, 8, 16  # tokens, sequences, steps, hidden, vocabulary
CU_SEQLENS, STEP_CU, STEP_ENDS = torch.tensor([0, 4, 6]), torch.tensor([0, 3, 4]), torch.tensor([0, 2, 3, 5])
GROUP_IDS, TARGETS = torch.tensor([0, 0]), torch.arange(T)
REAL = torch.tensor([[True] * 4, [True] * 2 + [False] * 2])


def calls() -> dict[str, object]:
    """What each function returned."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(T, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    head, logits = torch.randn(D, requires_grad=True), torch.randn(T, V, requires_grad=True)
    rows, steps, answers = torch.randn(4, T), torch.randn(K), torch.rand(S)
    logprobs, values = (-torch.rand(T)).requires_grad_(), torch.randn(T, requires_grad=True)
    shards = [
        qrm_fast.linear_logprobs_partial(hidden.detach(), part, TARGETS, vocab_start=start)
        for start, part in ((0, weight.detach()[: V // 2]), (V // 2, weight.detach()[V // 2 :]))
    ]
    return {
        "clip_delta": qrm_fast.clip_delta(steps, STEP_CU),
        "discounted_returns": qrm_fast.discounted_returns(rows[0], CU_SEQLENS),
        "from_padded": qrm_fast.from_padded(REAL, torch.randn(S, 4)),
        "gae": qrm_fast.gae(rows[0], rows[1], CU_SEQLENS),
        "gather_logprobs": qrm_fast.gather_logprobs(logits, TARGETS),
        "group_advantages": qrm_fast.group_advantages(answers, GROUP_IDS),
        "implicit_rewards": qrm_fast.implicit_rewards(rows[0], rows[1]),
        "informative_groups": qrm_fast.informative_groups(answers, GROUP_IDS),
        "linear_logprobs": qrm_fast.linear_logprobs(hidden, weight, TARGETS),
        "linear_logprobs_partial": shards[0],
        "linear_policy_loss": qrm_fast.linear_policy_loss(hidden, weight, TARGETS, rows[0]),
        "linear_q_values": qrm_fast.linear_q_values(
            hidden.detach(), weight.detach(), hidden.detach(), weight.detach(), TARGETS
        ),
        "linear_sample": qrm_fast.linear_sample(hidden.detach(), weight.detach(), torch.rand(T, dtype=torch.float64)),
        "loss_weights": qrm_fast.loss_weights(CU_SEQLENS),
        "merge_logprobs": qrm_fast.merge_logprobs(
            qrm_fast.LogprobsPartial(*map(torch.stack, zip(*shards, strict=True)))
        ),
        "min_form_returns": qrm_fast.min_form_returns(steps, STEP_ENDS, CU_SEQLENS),
        "min_gae": qrm_fast.min_gae(rows[0], rows[1], CU_SEQLENS),
        "pack": qrm_fast.pack([[2, 3, 4, 5, 1], [6, 7, 1]], [1, 1]),
        "pairwise_q_loss": qrm_fast.pairwise_q_loss(values, CU_SEQLENS),
        "per_token": qrm_fast.per_token(answers, CU_SEQLENS, T),
        "plan_microbatches": qrm_fast.plan_microbatches([4, 2], max_tokens=4),
        "policy_loss": qrm_fast.policy_loss(logprobs, rows[0]),
        "prm_rewards": qrm_fast.prm_rewards(torch.randn(K, 2)),
        "process_advantages": qrm_fast.process_advantages(steps, STEP_ENDS, CU_SEQLENS, GROUP_IDS, max_gen_len=8),
        "process_diagnostics": qrm_fast.process_diagnostics(steps, STEP_ENDS, CU_SEQLENS),
        "progress_rewards": qrm_fast.progress_rewards(steps, answers, STEP_CU),
        "q_advantages": qrm_fast.q_advantages(rows[0], rows[1], CU_SEQLENS),
        "q_head_advantages": qrm_fast.q_head_advantages(hidden.detach(), head.detach(), CU_SEQLENS),
        "q_token_rewards": qrm_fast.q_token_rewards(rows[0], CU_SEQLENS),
        "to_padded": qrm_fast.to_padded(rows[0], CU_SEQLENS, 4),
        "token_q": qrm_fast.token_q(hidden, head),
        "unpack": qrm_fast.unpack(rows[0], CU_SEQLENS),
        "value_loss": qrm_fast.value_loss(values, rows[0]),
        "vtrace": qrm_fast.vtrace(rows[0], rows[1], rows[2].exp(), CU_SEQLENS),
        "whiten": qrm_fast.whiten(rows[0]),
    }


def main() -> None:
    results = calls()
    functions = {name for name in qrm_fast.__all__ if not isinstance(getattr(qrm_fast, name), type)}
    assert results.keys() == functions, f"expected a call of every function, got {results.keys() ^ functions} wrong"
    for result in results.values():
        parts = result if isinstance(result, tuple) else (result,)
        losses = [x.sum() for x in parts if isinstance(x, torch.Tensor) and x.requires_grad]
        if losses:
            torch.autograd.backward(losses)
    print(*sorted(sys.modules), sep="\n")


if __name__ == "__main__":
    main()
