"""Call every public function and walk every gradient: `python tests/every_op.py`, the modules it loaded out.

What a user of the ops alone runs: test_dependencies.py starts it where nothing but the base dependencies is installed.
`--device cuda gae` calls one function there, at sizes of several blocks: a slot on a GPU runs each name of `--list`
under compute-sanitizer.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch

import qrm_fast


def calls(device: str, times: int) -> dict[str, list[Callable]]:
    """Each function with the options that lead to kernels of their own, over two sequences of 4 and 2 `times` rows."""
    torch.manual_seed(0)
    on = partial(torch.randn, device=device)
    num_tokens, dim, vocab = 6 * times, 8 + times, 16 * times
    cu_seqlens = times * torch.tensor([0, 4, 6], device=device)
    step_cu, step_ends = torch.tensor([0, 3, 4], device=device), times * torch.tensor([1, 3, 4, 6], device=device) - 1
    real = torch.tensor([[True] * 4, [True] * 2 + [False] * 2], device=device)
    group_ids = torch.zeros(2, dtype=torch.int64, device=device)
    targets = torch.arange(num_tokens, device=device) % vocab
    rows, steps, answers = on(4, num_tokens), on(4), on(2).abs()
    ratios = rows[2].exp()
    old, mask = -rows[3].abs(), rows[0] > -1

    def heads(dtype: torch.dtype, dim: int = dim) -> dict:
        """With a gradient."""
        hidden, weight = on(num_tokens, dim).to(dtype), on(vocab, dim).to(dtype)
        return {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_(), "targets": targets}

    narrow, wide = heads(torch.bfloat16), heads(torch.float32)
    odd = heads(torch.bfloat16, dim - 1)  # its rows do not begin where a copy engine could load them
    frozen = [{k: x.detach() for k, x in head.items()} for head in (narrow, wide)]
    logprobs, values = (-on(num_tokens).abs()).requires_grad_(), on(num_tokens).requires_grad_()
    logits = on(num_tokens, vocab).requires_grad_()
    capped = {"bias": on(vocab).requires_grad_(), "softcap": 30.0, "temperature": 0.7}
    loss = {"old_logprobs": old, "ref_logprobs": rows[1], "token_weights": rows[2].abs(), "kl_coef": 0.1}
    gspo = {"kind": "gspo", "cu_seqlens": cu_seqlens}
    in_steps = step_ends, cu_seqlens
    scored = {"scope": "group", "group_ids": group_ids, "eos_rescore": "mean", "center": True, "mask": mask}
    scored |= {"kl_coef": 0.1, "logprobs": rows[1], "ref_logprobs": rows[2]}

    def merged() -> qrm_fast.TokenLogprobs:
        halves = [partial_logprobs(head, start) for head in frozen[1:] for start in (0, vocab // 2)]
        return qrm_fast.merge_logprobs(qrm_fast.LogprobsPartial(*map(torch.stack, zip(*halves, strict=True))))

    def partial_logprobs(head: dict, start: int) -> qrm_fast.LogprobsPartial:
        shard = head["weight"][start : start + vocab // 2]
        return qrm_fast.linear_logprobs_partial(head["hidden"], shard, targets, vocab_start=start)

    f = qrm_fast
    return {
        "clip_delta": [lambda: f.clip_delta(steps, step_cu)],
        "discounted_returns": [lambda: f.discounted_returns(rows[0], cu_seqlens, mask=mask, gamma=0.9)],
        "from_padded": [lambda: f.from_padded(real, on(2, 4))],
        "gae": [lambda: f.gae(*rows[:2], cu_seqlens, mask=mask, gamma=0.9, lam=0.9)],
        "gather_logprobs": [lambda x=x: f.gather_logprobs(x, targets) for x in (logits, logits.bfloat16())],
        "group_advantages": [
            lambda kind=kind, options=options: f.group_advantages(answers, group_ids, kind=kind, **options)
            for kind, options in {
                **{"rloo": {}, "grpo": {}, "pass_at_k": {}},
                **{"opo": {"lengths": group_ids + 1}, "remax": {"baseline": answers}},
            }.items()
        ],
        "implicit_rewards": [lambda: f.implicit_rewards(rows[0], rows[1])],
        "informative_groups": [lambda: f.informative_groups(answers, group_ids)],
        "linear_logprobs": [
            lambda head=head, options=options: f.linear_logprobs(**head, **options)
            for head, options in ((narrow, {}), (odd, {}), (wide, capped))
        ],
        "linear_logprobs_partial": [partial(partial_logprobs, head, 0) for head in frozen],
        "linear_policy_loss": [
            lambda head=head, options=options: f.linear_policy_loss(**head, advantages=rows[0], **options)
            for head in (narrow, odd, wide)
            for options in ({}, loss | gspo | {"entropy_coef": 0.1})
        ],
        "linear_q_values": [
            lambda h=h: f.linear_q_values(h["hidden"], h["weight"], h["hidden"], h["weight"], targets) for h in frozen
        ],
        "linear_sample": [
            lambda head=head, options=options: f.linear_sample(
                head["hidden"], head["weight"], torch.rand(num_tokens, dtype=torch.float64, device=device), **options
            )
            for head, options in ((frozen[0], {}), (frozen[1], {"bias": capped["bias"].detach(), "softcap": 30.0}))
        ],
        "loss_weights": [
            lambda mode=mode: f.loss_weights(cu_seqlens, mask=mask, mode=mode, num_tokens=num_tokens)
            for mode in ("token-mean", "seq-mean-token-mean")
        ],
        "merge_logprobs": [merged],
        "min_form_returns": [
            lambda operator=operator: f.min_form_returns(steps, *in_steps, operator=operator)
            for operator in ("soft", "causal_soft", "sum")
        ],
        "min_gae": [lambda: f.min_gae(*rows[:2], cu_seqlens, mask=mask, lam=0.9)],
        "pack": [lambda: f.pack([[2, 3, 4, 5, 1], [6, 7, 1]], [1, 1], device=device)],
        "pairwise_q_loss": [lambda m=m: f.pairwise_q_loss(values, cu_seqlens, mask=m) for m in (None, mask)],
        "per_token": [lambda: f.per_token(answers, cu_seqlens, num_tokens)],
        "plan_microbatches": [lambda: f.plan_microbatches([4, 2], max_tokens=4)],
        "policy_loss": [
            lambda options=options: f.policy_loss(logprobs, rows[0], **options)
            for options in ({}, loss | gspo, {"entropy": values, "entropy_coef": 0.1, "kind": "cispo"})
        ],
        "prm_rewards": [lambda: f.prm_rewards(on(4, 2))],
        "process_advantages": [
            lambda preset=preset: f.process_advantages(
                *(steps, *in_steps, group_ids),
                **{"outcome_rewards": answers, "preset": preset, "max_gen_len": num_tokens, "num_tokens": num_tokens},
            )
            for preset in ("paper", "paper-step", "openrlhf", "verl")
        ],
        "process_diagnostics": [lambda: f.process_diagnostics(steps, *in_steps, advantages=rows[0])],
        "progress_rewards": [lambda: f.progress_rewards(steps, answers, step_cu)],
        "q_advantages": [lambda: f.q_advantages(rows[0], rows[1], cu_seqlens, **scored)],
        "q_head_advantages": [
            lambda head=head: f.q_head_advantages(head["hidden"], head["weight"][0], cu_seqlens, center=True)
            for head in frozen
        ],
        "q_token_rewards": [
            lambda options=options: f.q_token_rewards(rows[0], cu_seqlens, **options)
            for options in ({}, {"scope": "sequence"}, scored)
        ],
        "to_padded": [lambda: f.to_padded(rows[0], cu_seqlens, 4 * times)],
        "token_q": [
            lambda: f.token_q(wide["hidden"], wide["weight"][0]),
            lambda: f.token_q(
                *narrow.values(), norm_weight=narrow["weight"][0].detach(), bias=narrow["weight"].detach()[:, 0].clone()
            ),
        ],
        "unpack": [lambda: f.unpack(rows[0], cu_seqlens)],
        "value_loss": [lambda: f.value_loss(values, rows[0], old_values=rows[1], clip=0.2)],
        "vtrace": [lambda: f.vtrace(*rows[:2], ratios, cu_seqlens, mask=mask, gamma=0.9, lam=0.9)],
        "whiten": [lambda m=m: f.whiten(rows[0], mask=m) for m in (None, mask)],
    }


def tensors(result: object) -> Iterator[torch.Tensor]:
    for part in result if isinstance(result, tuple) else (result,):
        if isinstance(part, tuple):
            yield from tensors(part)
        elif isinstance(part, torch.Tensor):
            yield part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("functions", nargs="*", help="all by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--list", action="store_true", help="print the functions that run on a device")
    arguments = parser.parse_args()
    ways = calls("cpu" if arguments.list else arguments.device, times=1 if arguments.device == "cpu" else 200)
    functions = {name for name in qrm_fast.__all__ if not isinstance(getattr(qrm_fast, name), type)}
    assert ways.keys() == functions, f"expected a call of every function, got {ways.keys() ^ functions} wrong"
    if arguments.list:
        print(*sorted(functions - {"plan_microbatches", "pack"}))
        return
    for name in arguments.functions or ways:
        for call in ways[name]:
            losses = [x.float().sum() for x in tensors(call()) if x.requires_grad]
            if losses:
                torch.autograd.backward(losses)
    if arguments.device != "cpu":
        torch.cuda.synchronize()
    print(*sorted(sys.modules), sep="\n")


if __name__ == "__main__":
    main()
