"""Reinforcement learning of a policy, top to bottom: REINFORCE or PPO, credited token by token by a Q-RM
(arXiv 2505.23363), step by step by a PRM (PURE, arXiv 2504.15275), answer by answer by a verifier, or by several.

Prompts, rollout, pack, score, credit, update, evaluate. Sequences are packed, never padded; no [T, V] tensor exists in
a scoring or training forward; the log-probabilities of sampling are the old ones of PPO's ratio, so there is no pass
to recompute them.
"""

from itertools import islice, pairwise
from random import Random as HostRandom
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .. import PackedBatch, pack, plan_microbatches
from . import ranks
from .attention import check_packing, shares_prompts
from .checkpoint import save_checkpoint
from .coefficients import Coefficients
from .config import Config, check, check_budget, parse_streams, token_budget
from .data import Example, Prompt, Rows, read_rows
from .flops import update_flops
from .lora import Start, adapted
from .metrics import MetricsLog, Phases
from .models import check_context, load_policy, load_token_model, num_token_ids
from .optimizer import AdamW, trapezoid
from .policy import Policy
from .rewards import Credit, Packed, load_credit, verified
from .rollout import Engine, Rollout, TransformersEngine, check_rollout, check_sampling
from .run_folder import RunFolder
from .scorer import TokenScorer
from .token_rows import sharing_units
from .token_weights import weigh_tokens
from .tokenizers import encode_prompts, load_tokenizer, stop_ids
from .update import Denominators, MicroBatch, activations, disagreement, means, report, update, update_critic
from .verifiers import read_examples, read_prompts
from .vllm_engine import VLLMEngine


class PassAt1(NamedTuple):
    greedy: float
    sampled: float


class TrainResult(NamedTuple):
    directory: str  # the policy's checkpoint
    before: PassAt1 | None  # None without eval_data
    after: PassAt1 | None
    metrics: list[dict[str, float]]  # the rows of metrics.jsonl


class Parts(NamedTuple):
    """What a run is made of. None where its configuration has no such thing."""

    policy: Policy
    engine: Engine
    optimizer: AdamW
    credit: Credit
    reference: Policy | Start | None
    critic: TokenScorer | None
    critic_optimizer: AdamW | None
    share_prompts: bool  # answers to one prompt compute its rows once

    def learning(self) -> dict[str, Any]:
        """The parts that a resumed run takes up where they were; what is trained of a model is its optimiser's."""
        names = ("optimizer", "credit", "critic_optimizer")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def train(config: Config) -> TrainResult:
    """Run the loop of `config`. Same config, same bits, also through a resumed state.

    Raises ValueError for an unknown option or one out of range, malformed data, policy and reward model of different
    vocabularies, a Q-RM or PRM without a trained head, an answer longer than max_tokens or than a model's context, a
    model that does not compute packed sequences as it does each alone, and a state of another configuration;
    FloatingPointError after max_skipped steps that are not finite; `Stopped` after the step in which a signal came.
    """
    ranks.connect(config.device)
    check(config)
    folder = RunFolder(config)
    torch.manual_seed(config.seed)
    tokenizer = load_tokenizer(config.model)
    streams = parse_streams(config.reward)
    examples: Rows
    if "verifier" not in streams:
        examples = read_rows(config.data, Prompt)
    elif len(streams) == 1:
        examples = read_examples(config.data, config.verifier)
    else:
        share = config.labelled_share
        examples = read_prompts(config.data, config.verifier, labelled_share=share, seed=config.seed)
    eval_examples = read_examples(config.eval_data, config.verifier) if config.eval_data else Rows[Example]([], [])
    longest, longest_eval = (longest_answer(rows, tokenizer, config) for rows in (examples, eval_examples))
    if config.num_prompts < ranks.num_ranks():
        raise ValueError(f"num_prompts must be at least 1 per process, {ranks.num_ranks()}, got {config.num_prompts}")
    check_budget(longest, config)
    parts = load_parts(config, tokenizer, longest, longest_eval)
    with folder:
        rows = learn(config, folder, parts, tokenizer, examples, eval_examples)
        save_checkpoint(parts.policy.model, tokenizer, config.out)
    evaluated = [row for row in rows if "eval/pass@1_greedy" in row]
    passes = [PassAt1(row["eval/pass@1_greedy"], row["eval/pass@1_sampled"]) for row in evaluated]
    return TrainResult(config.out, passes[0] if passes else None, passes[-1] if passes else None, rows)


def learn(
    config: Config,
    folder: RunFolder,
    parts: Parts,
    tokenizer: PreTrainedTokenizerBase,
    examples: Rows,
    eval_examples: Rows[Example],
) -> list[dict[str, float]]:
    """The iterations. Returns the rows of metrics.jsonl."""
    policy, engine, optimizer, credit, reference, critic, critic_optimizer, share_prompts = parts
    coefficients = Coefficients(config)
    learning = parts.learning() | ({"coefficients": coefficients} if config.adaptive_kl else {})
    first = folder.load(learning)
    if first > config.num_iterations:
        raise ValueError(f"num_iterations must be at least the {first} done, got {config.num_iterations}")
    engine.sync(policy)
    log = MetricsLog(config.out, first_step=first + 1 if first else 0, tensorboard=config.tensorboard)
    phases = Phases(torch.device(config.device), peak_tflops=config.peak_tflops)
    flops = update_flops(policy)

    def evaluation() -> dict[str, float]:
        with phases("evaluate"), ranks.whole(policy):
            result = evaluate(engine, tokenizer, eval_examples, config)
        return {f"eval/pass@1_{name}": value for name, value in result._asdict().items()}

    if eval_examples and not first:
        log(0, evaluation() | phases.report())

    all_prompts = encode_prompts(tokenizer, examples)
    order = prompt_order(len(examples), config)
    skipped = 0  # steps in a row
    trained = [row["eval/pass@1_sampled"] for row in log.rows if row["step"] and "eval/pass@1_sampled" in row]
    best = ranks.gather_objects(max(trained, default=-1.0))[0]  # the first process has the log
    for iteration in range(first, config.num_iterations):
        now = coefficients.at(iteration)
        asked = ranks.share(order[iteration])  # every process has prompts of its own, and whole groups of answers
        seed = HostRandom(f"{config.seed} {iteration}").getrandbits(32) + ranks.rank()
        # ---- rollout: group_size answers to each prompt, with the log-probabilities they were sampled with
        prompts = [all_prompts[i] for i in asked]
        with phases("rollout"), ranks.whole(policy):
            rollout = engine.generate(
                prompts,
                num_samples=config.group_size,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                seed=seed,
            )
        check_rollout(rollout, len(prompts) * config.group_size, config.max_new_tokens)
        num_answers, num_actions = len(rollout.responses), sum(map(len, rollout.responses))
        phases.count("rollout", num_actions)
        group_ids = torch.arange(num_answers, device=config.device) // config.group_size  # [S]
        rows = [examples[i] for i in asked for _ in range(config.group_size)]
        prompts = [prompt for prompt in prompts for _ in range(config.group_size)]

        # ---- credit of answers: one on which nothing would act is not even packed
        earned = credit.of_answers(rollout, rows, group_ids)  # [S]
        kept = [s for s, response in enumerate(rollout.responses) if response]
        if earned is not None and not config.entropy_coef and not (config.kl_in == "loss" and config.kl_coef):
            worth = earned.tolist()
            kept = [s for s in kept if worth[s]] or kept[:1]

        # ---- pack: answers in the order of the micro-batches, so that one's actions are neighbours among the T rows
        with phases("pack"):
            lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, rollout.responses, strict=True)]
            counts = ranks.gather(torch.tensor([num_answers, num_actions, sum(rollout.finished), len(kept)]))
            num_minibatches = min(config.num_minibatches, int(counts[:, 3].max()))
            prompt_lens = list(map(len, prompts)) if share_prompts else None
            minibatches = plan(kept, lengths, prompt_lens, num_minibatches, config, seed)
            packed = pack_answers(minibatches, prompts, rollout, group_ids, share_prompts, seed)
            packed = packed._replace(kl_share=now.kl_coef / config.kl_coef if config.kl_coef else 1.0)
            num_tokens = sum(lengths[s] for s in kept)
            num_rows = sum(len(batch.input_ids) for batch in packed.batches)
            num_pairs = sum(lengths[s] * (lengths[s] + 1) // 2 for s in kept)  # of a query and a key it sees
            num_pairs -= sum(n * (n + 1) // 2 for n in shared_rows(minibatches, prompt_lens, config.group_size))

        # ---- score
        with phases("score"), torch.no_grad():
            if reference is not None:
                scored = [reference(batch, temperature=config.temperature).logprobs for batch in packed.batches]
                packed = packed._replace(ref_logprobs=torch.cat(scored))  # [T]
            if critic is not None:
                packed = packed._replace(values=torch.cat([critic(batch) for batch in packed.batches]))  # [T]

        # ---- credit of tokens
        with phases("credit"), torch.no_grad():
            advantages, returns = credit.of_tokens(packed)  # [T], [T]
            if credit.models:
                phases.count("credit", num_tokens)
            sampled, own = packed.logprobs, credit.metrics()
            if config.top_entropy < 1 or config.importance != "none":
                advantages, old_logprobs, shares = weigh_tokens(policy, packed, advantages, config)
                packed, own = packed._replace(logprobs=old_logprobs), own | shares

        # ---- update: the log-probabilities of sampling are the old ones
        with phases("update"):
            share = trapezoid(iteration, config.num_iterations, warmup=config.warmup_iterations, decay=config.decay)
            all_answers, all_actions, all_finished, _ = counts.sum(0).tolist()
            denominators = Denominators(all_answers / len(minibatches), all_actions / len(minibatches))
            sizes = [len(batch.action_index) for batch in packed.batches]
            columns = [x.split(sizes) for x in (advantages, returns, packed.logprobs)]
            refs = [None] * len(sizes) if packed.ref_logprobs is None else packed.ref_logprobs.split(sizes)
            microbatches = map(MicroBatch, packed.batches, *columns, refs)
            steps = [list(islice(microbatches, len(minibatch))) for minibatch in minibatches]
            sums, critic_norms = [], []
            for epoch in range(1, config.num_epochs + 1):
                for step in steps:
                    sums.append(update(policy, optimizer, step, denominators, now, config.lr * share))
                    if critic is not None and critic_optimizer is not None:
                        lr = config.critic_lr * share
                        critic_norms.append(update_critic(critic, critic_optimizer, step, denominators, config, lr))
                phases.count("update", num_tokens, flops.total(num_rows, sum(sizes), num_pairs))
                if config.target_kl and epoch < config.num_epochs:
                    kl = means(sums[-len(steps) :], [])["policy/approx_kl"]
                    if kl.item() > config.target_kl:
                        break
            engine.sync(policy)

        # ---- report; this is where the step waits for the device
        own |= disagreement(sums[0], sampled)
        own["perf/prefix_sharing"] = torch.tensor(1 - num_rows / num_tokens)
        room = len(packed.batches) * token_budget(max(lengths), config)
        own["perf/microbatch_fill"] = torch.tensor(num_rows / room)
        row = report(advantages, sums, critic_norms, own, num_answers)
        skipped = skipped + int(row["policy/skipped"]) if row["policy/skipped"] else 0
        if skipped > config.max_skipped:
            broken = packed.answers[packed.answer_of_token()[~advantages.isfinite()].unique()].tolist()
            places = [examples.places[asked[s // config.group_size]] for s in broken]
            why = f"; the credit of {len(places)} answers is not, the first is to {places[0]}" if places else ""
            raise FloatingPointError(
                f"iteration {iteration + 1} gave a gradient that is not finite (loss {row['policy/loss']}{why}): "
                f"{skipped} steps in a row are skipped, more than max_skipped, and nothing more is saved"
            )
        row |= {
            "response/length": all_actions / all_answers,
            "response/finished": all_finished / all_answers,
            "policy/lr": config.lr * share,
            "policy/epochs": len(sums) / len(steps),
        } | coefficients.metrics(now)
        coefficients.observe(row["policy/ref_kl"])
        if eval_examples and ((iteration + 1) % config.eval_every == 0 or iteration + 1 == config.num_iterations):
            row |= evaluation()
            if row["eval/pass@1_sampled"] > best:
                best = row["eval/pass@1_sampled"]
                save_checkpoint(policy.model, tokenizer, folder.path / "best")
        log(iteration + 1, row | phases.report())
        folder.keep(iteration + 1, learning)
    return log.rows


def load_parts(config: Config, tokenizer: PreTrainedTokenizerBase, longest: int, longest_eval: int) -> Parts:
    """Models, their optimisers and the reward stream. Raises for a model that the loop would not reproduce."""
    device, dtype = config.device, getattr(torch, config.dtype)

    def load_start() -> Policy:
        model = load_policy(config.model, tokenizer, device=device, dtype=dtype)
        return Policy(model, num_ids=num_token_ids(tokenizer))

    policy = load_start()
    policy.model = adapted(policy.model, config.model, config)
    credit = load_credit(config, tokenizer, policy)
    reference: Policy | Start | None = None
    if config.kl_coef:
        reference = Start(policy) if config.lora_rank else load_start().requires_grad_(False)
    critic = None
    if config.value_coef or config.estimator != "own":
        # the critic starts as the Q-RM, or the policy's backbone, with a new head
        model = load_token_model(config.q_rm or config.model, tokenizer, device=device, dtype=dtype)
        model.score.reset_parameters()
        critic = TokenScorer(adapted(model, config.model, config), reads_action=False)
    # a reference of the policy's own weights is no module
    modules = [x for x in (policy, *credit.models, reference, critic) if isinstance(x, nn.Module)]
    for module in modules:
        check_context(module.model, max(longest, longest_eval) if module is policy else longest)
        check_packing(module.model, longest)
    share_prompts = all(shares_prompts(module.model, longest) for module in modules)
    ends = stop_ids(tokenizer, policy.model.generation_config)
    engine: Engine
    if config.engine == "vllm":
        engine = VLLMEngine(policy, ends, max_len=max(longest, longest_eval), cache_gib=config.engine_cache_gib)
    else:
        engine = TransformersEngine(policy, ends)
    check_sampling(engine, policy, longest)
    for trained in (policy, critic):
        if trained is not None:
            with activations(trained, config):  # refused before anything is sampled
                pass
    for module in modules:
        ranks.shard(module)
    with torch.no_grad(), ranks.whole(policy):
        policy(pack([[0]], [1], device=device))  # FSDP2's first forward pass must be one of the whole module
    optimizer = AdamW(policy.train().parameters())
    critic_optimizer = None if critic is None else AdamW(critic.train().parameters())
    return Parts(policy, engine, optimizer, credit, reference, critic, critic_optimizer, share_prompts)


def longest_answer(rows: Rows, tokenizer: PreTrainedTokenizerBase, config: Config) -> int:
    """Tokens of the longest prompt with the longest answer that sampling may give."""
    return max(map(len, encode_prompts(tokenizer, rows)), default=0) + config.max_new_tokens


def evaluate(engine: Engine, tokenizer: PreTrainedTokenizerBase, examples: Rows[Example], config: Config) -> PassAt1:
    """Share of right answers over `examples`: greedy, and the mean over `eval_samples` answers at temperature 1.

    The samples of one policy are the same at every call: their seed is the run's.
    """
    prompts = ranks.share(encode_prompts(tokenizer, examples))

    def share_right(num_samples: int, temperature: float) -> float:
        labels = [example.label for example in ranks.share(examples) for _ in range(num_samples)]
        right = torch.zeros(0)
        if prompts:  # some process may have none
            rollout = engine.generate(
                prompts,
                num_samples=num_samples,
                max_new_tokens=config.max_new_tokens,
                temperature=temperature,
                seed=config.seed + ranks.rank(),
            )
            right = verified(config.verifier, tokenizer, rollout.responses, rollout.finished, labels)
        num_right = ranks.gather(right.sum()).sum().item()
        return num_right / (len(examples) * num_samples)

    return PassAt1(greedy=share_right(1, 0.0), sampled=share_right(config.eval_samples, 1.0))


def prompt_order(num_examples: int, config: Config) -> list[list[int]]:
    """The prompts of every iteration: passes over the data, each in a new order."""
    generator = torch.Generator().manual_seed(config.seed)
    num_passes = -(-config.num_iterations * config.num_prompts // num_examples)
    passes = torch.cat([torch.randperm(num_examples, generator=generator) for _ in range(num_passes)])
    return [x.tolist() for x in passes.split(config.num_prompts)[: config.num_iterations]]


def plan(
    kept: list[int],
    lengths: list[int],
    prompt_lens: list[int] | None,
    num_minibatches: int,
    config: Config,
    seed: int,
) -> list[list[list[int]]]:
    """Answers by mini-batch and micro-batch: mini-batches of random prompts, micro-batches within the budget.

    With `prompt_lens` the answers to one prompt share it: they are in one micro-batch as far as it holds them.
    Every process has as many micro-batches in a mini-batch as the others, the last of them empty where it needs fewer.
    """
    place = list(range(len(lengths)))
    if config.num_minibatches > 1:
        place = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    groups = [s // config.group_size for s in range(len(lengths))]
    # by prompt, and by length, because packed attention takes equally long neighbours in one call
    order = sorted(kept, key=lambda s: (place[groups[s]], lengths[s]))
    max_tokens, minibatches = token_budget(max(lengths), config), []
    for part in (x.tolist() for x in torch.tensor(order).tensor_split(num_minibatches)):
        units, rows = sharing_units(part, groups, lengths, prompt_lens, max_tokens)
        microbatches = plan_microbatches(rows, max_tokens=max_tokens)[0]
        by_length = (sorted((units[i] for i in m), key=lambda unit: lengths[unit[0]]) for m in microbatches)
        minibatches.append([[s for unit in units for s in unit] for units in by_length])
    most = ranks.gather(torch.tensor([len(minibatch) for minibatch in minibatches])).amax(0).tolist()
    return [minibatch + [[]] * (n - len(minibatch)) for minibatch, n in zip(minibatches, most, strict=True)]


def shared_rows(minibatches: list[list[list[int]]], prompt_lens: list[int] | None, group_size: int) -> list[int]:
    """Of every answer whose prompt another one computes, the rows that it saves."""
    if prompt_lens is None:
        return []
    neighbours = (pair for minibatch in minibatches for answers in minibatch for pair in pairwise(answers))
    return [prompt_lens[b] - 1 for a, b in neighbours if a // group_size == b // group_size]


def pack_answers(
    minibatches: list[list[list[int]]],
    prompts: list[list[int]],
    rollout: Rollout,
    group_ids: Tensor,
    share_prompts: bool,
    seed: int,
) -> Packed:
    """The answers of a plan, micro-batch by micro-batch."""
    device, responses = group_ids.device, rollout.responses

    def packed(answers: list[int]) -> PackedBatch:
        if not answers:  # one token and no action: the passes that the other processes make, and no number
            batch = pack([prompts[0][:1]], [1], device=device)
            return batch._replace(action_cu_seqlens=batch.action_cu_seqlens[:1])
        sequences, prompt_lens = [prompts[s] + responses[s] for s in answers], [len(prompts[s]) for s in answers]
        return pack(sequences, prompt_lens, share_prompts=share_prompts, device=device)

    batches = [packed(answers) for minibatch in minibatches for answers in minibatch]
    kept = [s for minibatch in minibatches for answers in minibatch for s in answers]
    answers = torch.tensor(kept, device=device)
    return Packed(
        batches=batches,
        answers=answers,
        cu_seqlens=torch.tensor([0, *(len(responses[s]) for s in kept)], device=device).cumsum(0),
        group_ids=group_ids[answers],
        logprobs=torch.cat([rollout.logprobs[s] for s in kept]),
        ref_logprobs=None,
        values=None,
        seed=seed,
    )
