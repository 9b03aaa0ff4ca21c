"""Reward streams from scores to loss, against the papers' formulas worked by hand and the golden vectors of PURE."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from qrm_fast import loss_weights, pack, policy_loss
from qrm_fast.rl.arithmetic import STEP
from qrm_fast.rl.config import PRESETS, Config, parse_streams, preset
from qrm_fast.rl.data import Example, Prompt
from qrm_fast.rl.models import load_policy
from qrm_fast.rl.optimizer import AdamW
from qrm_fast.rl.policy import Policy
from qrm_fast.rl.rewards import Packed
from qrm_fast.rl.rewards.prime import Prime
from qrm_fast.rl.rewards.process import Process
from qrm_fast.rl.rewards.q_rm import QRM, Implicit, Outcome, VocabularyQ
from qrm_fast.rl.rewards.verifier import Verifier
from qrm_fast.rl.rewards.weighted import Weighted
from qrm_fast.rl.rollout import Rollout
from qrm_fast.rl.scorer import VocabularyScorer
from qrm_fast.rl.tokenizers import load_tokenizer
from qrm_fast.rl.update import Denominators, weights_of
from qrm_fast.rl.verifiers import VERIFIERS

BLANK, DIGIT, EOS = 16, 4, 1
PURE = ("pure-paper", "pure-paper-step", "pure-openrlhf", "pure-verl")
TOKENIZER = load_tokenizer("arithmetic")


@pytest.fixture(autouse=True)
def rights(monkeypatch):
    """A verifier that finds an answer right whose label says so."""
    monkeypatch.setitem(VERIFIERS, "label", lambda response, label: label == "right")


def config_of(name, **options):
    options = {"max_new_tokens": 12, "verifier": "label", "kl_coef": 0.0, **options}
    return Config(model="m", data="d", out="o", **{**preset(name, "ppo"), **options})


def answers_of(lengths_and_ends):
    """Responses whose steps are closed by a blank line, the last one by EOS."""
    return [
        [EOS if t == length - 1 else BLANK if t in ends else DIGIT for t in range(length)]
        for length, ends in lengths_and_ends
    ]


def packed_of(responses, *, logprobs=None, ref_logprobs=None, values=None, groups=None):
    batch = pack([[2, *response] for response in responses], [1] * len(responses))
    num_answers, num_actions = len(responses), len(batch.action_index)
    return Packed(
        batches=[batch],
        answers=torch.arange(num_answers),
        cu_seqlens=batch.action_cu_seqlens.long(),
        group_ids=torch.tensor(groups or [0] * num_answers),
        logprobs=torch.full((num_actions,), -1.0) if logprobs is None else torch.tensor(logprobs),
        ref_logprobs=None if ref_logprobs is None else torch.tensor(ref_logprobs),
        values=None if values is None else torch.tensor(values),
        seed=0,
    )


class Scorer:
    """A PRM that says what it is told to: r = tanh((z1 - z0) / 2)."""

    def __init__(self, rewards):
        self.rewards = rewards
        self.model = SimpleNamespace(config=SimpleNamespace(step_separator=STEP), device="cpu")

    def __call__(self, batch, step_ends):
        z = torch.atanh(torch.tensor(self.rewards, dtype=torch.float64))
        assert len(z) == len(step_ends)
        return torch.stack([-z, z], -1).float()


def process_of(config, step_rewards, weight=1.0, right=None, share=1.0):
    verifier = None if right is None else Verifier(TOKENIZER, config)
    return Process(Scorer(step_rewards), TOKENIZER, config, weight, verifier, share)


def tell(stream, responses, right, groups=None):
    """Let a stream see the answers, of which `right` says 1, 0 or None where there is no label."""
    rollout = Rollout(responses, [torch.zeros(len(row)) for row in responses], [True] * len(responses))
    examples = [Prompt("?") if x is None else Example("?", "right" if x else "wrong") for x in right]
    return stream.of_answers(rollout, examples, torch.tensor(groups or [0] * len(responses)))


# ---- PURE: golden vectors of three answers, N = 12, from logits of a PRM and a verifier

GOLDEN = answers_of([(6, [2, 5]), (4, [3]), (5, [1, 4])]), [0.9, -0.4, 0.7, 0.2, 0.6], [0, 1, 1]
EXPECTED = {
    "pure-paper": [-1.535278901] * 3 + [-1.535280935] * 3 + [1.281384347] * 4 + [0.690527337] * 2 + [0.494124579] * 3,
    "pure-openrlhf": [-1.265035362] * 2 + [0] + [-1.110463091] * 2 + [0] + [1.077950983] * 3 + [0]
    + [0.590772928, 0] + [0.463185514] * 2 + [0],
    "pure-verl": [-1.146857114] * 3 + [-1.146858955] * 3 + [1.099832919] * 4 + [0.602975670] * 2 + [0.425288397] * 3,
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_the_presets_of_pure_give_the_golden_vectors(name):
    responses, rewards, right = GOLDEN
    process = process_of(config_of(name), rewards, right=right)
    assert tell(process, responses, right) is None
    advantages = process.of_tokens(packed_of(responses)).advantages
    torch.testing.assert_close(advantages, torch.tensor(EXPECTED[name]), rtol=0, atol=2e-7)
    assert process.metrics()["reward/mean"].item() == pytest.approx(2 / 3)
    assert process.metrics()["reward/process"].item() == pytest.approx((-0.399997062 + 0.7 + 0.207194484) / 3)
    assert process.metrics()["process/num_steps"].item() == pytest.approx(5 / 3)
    assert process.metrics()["process/one_step"].item() == pytest.approx(1 / 3)


# ---- PURE: two answers, step by step to the loss

TWO = answers_of([(4, [1, 3]), (3, [2])])  # r = (.6, -.2) and (.4); the second is right
W = 1 / (1 + math.exp(8))  # weight of the first step: exp(-6) / (exp(-6) + exp(2))
S1, G2 = 0.6 * W - 0.2 * (1 - W), -0.2 * (1 - W)
LOGP, OLD = [-0.5, -1.0, -1.5, -2.0, -0.4, -0.8, -1.2], [-0.7, -1.0, -1.4, -2.5, -0.4, -0.7, -1.0]
PENALTY = 0.01  # per token: coefficient 0.1, log-ratio 0.1


def to_go(length):
    return [PENALTY * (length - t) for t in range(length)]


def paper():
    first = [-1 + g - 3 * 0.4 / 8 for g in (S1, S1, G2, G2)]  # eq. 7: N = 8, one other answer
    second = [1 + 0.4 - (2 * S1 + 2 * G2) / 8] * 3
    return [a - k for a, k in zip(first + second, to_go(4) + to_go(3), strict=True)]


def paper_step():
    first = [-1 + S1 - 2 * 0.4] * 2 + [-1 + G2 - 0.4] * 2  # eq. 8: the other's .4 over its one step, once per step left
    second = [1 + 0.4 - S1 / 2] * 3
    return [a - k for a, k in zip(first + second, to_go(4) + to_go(3), strict=True)]


def openrlhf():
    b1, b2 = 0.4 / 3, S1 / 4  # the other's soft minimum per token
    first = [-1 + S1 - 2 * b1] * 2 + [-1 + G2 - b1] * 2  # one token of each step does not end it
    second = [1 + 0.4 - 2 * b2] * 3
    raw = [a - k for a, k in zip(first + second, to_go(4) + to_go(3), strict=True)]
    raw = [0.0 if t in (1, 3, 6) else a for t, a in enumerate(raw)]  # step ends have no part in the gradient
    mean = sum(raw) / 4
    std = math.sqrt(sum((a - mean) ** 2 for a in raw) / 4)
    return [0.0 if a == 0 else (a - mean) / std for a in raw]


def verl():
    to_go_sums = [sum(to_go(4)), sum(to_go(3))]
    totals = [2 * S1 + 2 * G2 - to_go_sums[0], 3 * (0.4 + 1) - to_go_sums[1]]
    first = [g - totals[1] / 8 for g in (S1, S1, G2, G2)]
    second = [1.4 - totals[0] / 8] * 3
    raw = [a - k for a, k in zip(first + second, to_go(4) + to_go(3), strict=True)]
    mean = sum(raw) / 7
    variance = sum((a - mean) ** 2 for a in raw) / 6
    return [(a - mean) / math.sqrt(variance + 1e-8) for a in raw]


def clipped(advantages, weights):
    loss = 0.0
    for a, w, new, old in zip(advantages, weights, LOGP, OLD, strict=True):
        ratio = math.exp(new - old)
        loss -= w * min(a * ratio, a * min(max(ratio, 0.8), 1.2))
    return loss


@pytest.mark.parametrize(
    ("name", "advantages", "weights", "loss"),
    [
        ("pure-paper", paper(), [1 / 7] * 7, 0.361433),
        ("pure-paper-step", paper_step(), [1 / 7] * 7, 0.658924),
        ("pure-openrlhf", openrlhf(), [1 / 8] * 4 + [1 / 6] * 3, -0.049513),
        ("pure-verl", verl(), [1 / 7] * 7, 0.130487),
    ],
)
def test_two_answers_by_hand_from_scores_to_loss(name, advantages, weights, loss):
    config = config_of(name, max_new_tokens=8, kl_coef=0.1, kl_estimator="k1")
    process = process_of(config, [0.6, -0.2, 0.4], right=[0, 1])
    tell(process, TWO, [0, 1])
    packed = packed_of(TWO, logprobs=OLD, ref_logprobs=[x - 0.1 for x in OLD])
    got = process.of_tokens(packed).advantages
    torch.testing.assert_close(got, torch.tensor(advantages), rtol=0, atol=1e-5)
    ours = loss_weights(packed.cu_seqlens, mode=config.loss_mode, global_tokens=7, global_sequences=2, num_tokens=7)
    assert ours.tolist() == pytest.approx(weights)
    total = policy_loss(torch.tensor(LOGP), got, old_logprobs=packed.logprobs, token_weights=ours, kind="ppo").loss
    assert total.item() == pytest.approx(clipped(advantages, weights), abs=1e-6)
    assert total.item() == pytest.approx(loss, abs=2e-6)


def test_an_operator_and_a_weight_reach_the_advantages():
    returns = {
        "soft": [S1, S1, G2, G2], "hard": [-0.2] * 4, "revmin": [-0.2] * 4, "sum": [0.4, 0.4, -0.2, -0.2],
        "causal_soft": [S1, S1, -0.2, -0.2], "mean": [0.2, 0.2, -0.1, -0.1],
    }  # fmt: skip
    for operator, of_first in returns.items():
        config = config_of("pure-paper", operator=operator)
        process = process_of(config, [0.6, -0.2, 0.4], weight=0.5)
        got = process.of_tokens(packed_of(TWO, groups=[0, 1])).advantages  # alone with their prompts: no baseline
        torch.testing.assert_close(got, 0.5 * torch.tensor([*of_first, 0.4, 0.4, 0.4]), rtol=0, atol=1e-6)


def test_a_prompt_without_a_label_has_no_part_of_the_verifier():
    config = config_of("pure-paper", max_new_tokens=8)
    responses = TWO + TWO
    process = process_of(config, [0.6, -0.2, 0.4] * 2, right=[], share=2.0)
    tell(process, responses, [0, 1, None, None], groups=[0, 0, 1, 1])
    got = process.of_tokens(packed_of(responses, groups=[0, 0, 1, 1])).advantages
    judged = torch.tensor([-2.0] * 4 + [2.0] * 3)
    torch.testing.assert_close(got[:7] - got[7:], judged, rtol=0, atol=1e-6)
    assert process.metrics()["reward/mean"].item() == 0.5


def test_a_lone_answer_without_a_label_is_not_taken_for_a_wrong_one():
    """openrlhf's code shifts outcomes to -1 and 0, so what is not judged must not be there at all."""
    config, packed = config_of("pure-openrlhf"), packed_of(TWO, groups=[0, 1])
    judged = process_of(config, [0.6, -0.2, 0.4], right=[])
    tell(judged, TWO, [None, 1], groups=[0, 1])
    alone = process_of(config, [0.6, -0.2, 0.4]).of_tokens(packed).advantages
    torch.testing.assert_close(judged.of_tokens(packed).advantages, alone)


# ---- critics


def test_min_gae_is_the_worst_step_to_come_beside_the_critic():
    config = config_of("pure-paper", estimator="min-gae", lam=0.5, kl_coef=0.1)
    process = process_of(config, [0.6, -0.2, 0.4], weight=2.0)
    values = [0.1, 0.2, 0.3, -0.1, 0.0, 0.5, 0.6]
    packed = packed_of(TWO, values=values, ref_logprobs=[-1.1] * 7)
    q = [0.0] * 7
    q[3] = -0.2
    q[2] = 0.5 * -0.1 + 0.5 * q[3]
    q[1] = min(0.6, 0.5 * 0.3 + 0.5 * q[2])
    q[0] = 0.5 * 0.2 + 0.5 * q[1]
    q[6] = 0.4
    q[5] = 0.5 * 0.6 + 0.5 * q[6]
    q[4] = 0.5 * 0.5 + 0.5 * q[5]
    advantages, returns = process.of_tokens(packed)
    torch.testing.assert_close(returns, torch.tensor(q), rtol=0, atol=1e-6)
    kl = torch.tensor(to_go(4) + to_go(3))
    torch.testing.assert_close(advantages, 2 * (returns - packed.values) - kl, rtol=0, atol=1e-6)


def test_gae_sums_the_rewards_of_all_streams():
    """Soft step rewards and half the verifier's on the last token, minus the penalty; gamma 1, lambda .5."""
    config = config_of("pure-paper", reward="pure=2,verifier=0.5", estimator="gae", lam=0.5, kl_coef=0.1)
    process = process_of(config, [0.6, -0.2, 0.4], weight=2.0, right=[0, 1], share=0.5)
    weighted = Weighted({"pure": (1.0, process)}, config)
    assert tell(weighted, TWO, [0, 1]) is None
    values = [0.1, 0.2, 0.3, -0.1, 0.0, 0.5, 0.6]
    packed = packed_of(TWO, values=values, ref_logprobs=[-1.1] * 7)
    r = [-0.01, 2 * 0.6 * W - 0.01, -0.01, 2 * G2 - 0.01, -0.01, -0.01, 2 * 0.4 + 0.5 - 0.01]
    advantages = [0.0] * 8
    for t in reversed(range(7)):
        last = t in (3, 6)
        delta = r[t] + (0 if last else values[t + 1]) - values[t]
        advantages[t] = delta + (0 if last else 0.5 * advantages[t + 1])
    got = weighted.of_tokens(packed)
    torch.testing.assert_close(got.advantages, torch.tensor(advantages[:7]), rtol=0, atol=1e-6)
    torch.testing.assert_close(got.returns, got.advantages + packed.values)


# ---- what Q-RM is compared with: golden vectors of the released code, rows of 4 and 3 actions

R = torch.tensor([0.5, -1, 2, 1.5, -0.5, 0.25, 3])
LOG = [-0.1, -0.7, -0.2, -1.1, -0.3, -0.4, -0.05], [-0.3, -0.5, -0.2, -2.1, -0.35, -0.1, -0.45]
V = [0.2, 0.4, 0.1, -0.3, 0.6, 0.5, 0.2]


def test_an_orm_gives_the_golden_vectors():
    packed = packed_of(answers_of([(4, [3]), (3, [2])]), logprobs=LOG[0], ref_logprobs=LOG[1], values=V)
    config = config_of("orm", kl_coef=0.01, min_std_share=0.0)
    assert (config.estimator, config.gamma, config.lam, config.kl_estimator) == ("gae", 0.9, 0.8, "abs")
    outcome = Outcome(lambda batch: R, config, kl_coef=0.0)
    advantages, returns = Weighted({"orm": (1.0, outcome)}, config).of_tokens(packed)
    expected = [0.604026, 0.619480, 1.293723, 2.310726, 1.606275, 2.439965, 3.837452]
    broadcast = torch.tensor([1.5] * 4 + [3.0] * 3)
    assert outcome.q_std.item() == pytest.approx(broadcast.std(correction=0).item())
    torch.testing.assert_close(advantages, torch.tensor(expected), rtol=0, atol=2e-6)
    torch.testing.assert_close(returns, advantages + packed.values)
    alone = Outcome(lambda batch: R, config_of("orm", estimator="own", min_std_share=0.0), kl_coef=0.0)
    got = alone.of_tokens(packed._replace(values=None)).advantages
    torch.testing.assert_close(got, torch.tensor([2.020726] * 4 + [4.041452] * 3), rtol=0, atol=2e-6)


def policy(logprobs):
    return lambda batch: SimpleNamespace(logprobs=logprobs)


class Given(torch.nn.Module):
    """A policy of given log-probabilities, of which training moves the level alone."""

    def __init__(self, logprobs):
        super().__init__()
        self.given, self.level = logprobs, torch.nn.Parameter(torch.zeros(()))

    def forward(self, batch):
        return SimpleNamespace(logprobs=self.given + self.level)


def test_dense_rewards_under_gae_give_the_golden_vectors():
    """The released code's case D, by the stream of an implicit reward model whose log-ratios are R / .1."""
    packed = packed_of(answers_of([(4, [3]), (3, [2])]), logprobs=LOG[0], ref_logprobs=LOG[1], values=V)
    config = config_of("dpo-rm", kl_coef=0.01, min_std_share=0.0)
    implicit = Implicit(policy(10 * R - 1), policy(torch.full((7,), -1.0)), 0.1, config, kl_coef=0.0)
    advantages = Weighted({"implicit": (1.0, implicit)}, config).of_tokens(packed).advantages
    expected = [0.897355, 0.498453, 2.182486, 1.431406, 0.451096, 1.363978, 2.078811]
    torch.testing.assert_close(advantages, torch.tensor(expected), rtol=0, atol=5e-6)


SD, MEAN = 1.3141692, 0.8214286
DISTANCE = [a - b for a, b in zip(*LOG, strict=True)]
SCALED = [(r - MEAN) / SD for r in R.tolist()]
EOS_MEAN = [0.380469, -0.760937, 1.521874, 0.570703, -0.380469, 0.190234, 0.697526]  # case B
RELEASED = [0.371249, -0.777377, 1.518264, 1.142236, -0.402628, 0.169184, 2.271591]  # case A
SUMMED = [0.897355, 0.498453, 2.182486, 1.431406, 0.451096, 1.363978, 2.078811]  # case D
NEW = [-0.2, -0.5, -0.2, -1.5, -0.3, -0.9, -0.04]
BY_HAND = {
    ("qrm-released", "reinforce"): EOS_MEAN,
    ("qrm-released", "ppo"): RELEASED,
    ("qrm-paper", "reinforce"): SCALED,
    ("qrm-paper", "ppo"): [s - 0.01 * d - v for s, d, v in zip(SCALED, DISTANCE, V, strict=True)],
    ("qrm-vocab", "reinforce"): [r / SD for r in R.tolist()],
    ("qrm-vocab", "ppo"): [r / SD - 0.01 * d for r, d in zip(R.tolist(), DISTANCE, strict=True)],
    ("orm", "reinforce"): [2.020726] * 4 + [4.041452] * 3,  # case E
    ("orm", "ppo"): [0.604026, 0.619480, 1.293723, 2.310726, 1.606275, 2.439965, 3.837452],  # case C
    ("dpo-rm", "reinforce"): EOS_MEAN,
    ("dpo-rm", "ppo"): SUMMED,
    # sums to come of R less the other's mean, 11/12 and 3/4, beside the verifier's -1 and 1
    **{("prime", x): [-5 / 3, -5 / 4, 2 / 3, -5 / 12, 3 / 2, 11 / 4, 13 / 4] for x in ("reinforce", "ppo")},
    **{("rloo", x): [-1.0] * 4 + [1.0] * 3 for x in ("reinforce", "ppo")},
    **{("grpo", x): [-(0.5**0.5)] * 4 + [0.5**0.5] * 3 for x in ("reinforce", "ppo")},
    **{("dr-grpo", x): [-0.5] * 4 + [0.5] * 3 for x in ("reinforce", "ppo")},
}


def test_every_preset_is_worked_by_hand():
    assert PRESETS.keys() - BY_HAND.keys() == {(n, x) for n in PURE for x in ("reinforce", "ppo")}


@pytest.mark.parametrize(("name", "algorithm"), BY_HAND)
def test_two_rows_by_hand_from_scores_to_loss(name, algorithm):
    """Two answers of 4 and 3 actions with scores R, the second right; the released code's golden vectors."""
    values = {**preset(name, algorithm), "min_std_share": 0.0, "max_new_tokens": 12, "verifier": "label"}
    if name == "prime":
        values["implicit_lr"] = 1e-30
    config = Config(model="m", data="d", out="o", **values)
    responses = answers_of([(4, [3]), (3, [2])])
    kl_coef = config.kl_coef if config.kl_in == "reward" else 0.0
    verifier = Verifier(TOKENIZER, config)
    streams = {
        "q-rm": lambda: QRM(lambda batch: R, config, kl_coef),
        "qrm-vocab": lambda: QRM(lambda batch: R, config, kl_coef),  # Q - E_pi[Q] is R
        "orm": lambda: Outcome(lambda batch: R, config, kl_coef),
        "implicit": lambda: Implicit(policy(10 * R - 1), policy(torch.full((7,), -1.0)), 0.1, config, kl_coef),
        "verifier": lambda: verifier,
    }
    if name == "prime":  # log-ratios are R / .1 before and after a step that moves nothing
        log_ratio = Given(10 * R - 1)
        streams["implicit"] = lambda: Prime(log_ratio, policy(torch.full((7,), -1.0)), 0.1, config, kl_coef, verifier)
    credit = Weighted({x: (weight, streams[x]()) for x, weight in parse_streams(config.reward).items()}, config)
    tell(credit, responses, [0, 1])
    has_critic = config.value_coef or config.estimator != "own"
    reference = LOG[1] if config.kl_coef else None
    packed = packed_of(responses, logprobs=LOG[0], ref_logprobs=reference, values=V if has_critic else None)
    with torch.no_grad():  # as in the loop
        advantages = credit.of_tokens(packed).advantages
    expected = BY_HAND[name, algorithm]
    torch.testing.assert_close(advantages, torch.tensor(expected), rtol=0, atol=1e-5)

    of_rows = {"grpo": [1 / 8] * 4 + [1 / 6] * 3, "dr-grpo": [1 / 24] * 7}.get(name, [1 / 7] * 7)
    weights = weights_of(packed.batches[0], Denominators(2, 7), config)
    assert weights.tolist() == pytest.approx(of_rows)
    got = policy_loss(
        torch.tensor(NEW), advantages, old_logprobs=packed.logprobs, token_weights=weights, kind=config.algorithm
    ).loss.item()
    loss = 0.0
    for a, w, new, old in zip(expected, of_rows, NEW, LOG[0], strict=True):
        ratio = math.exp(new - old)
        clipped = min(a * ratio, a * min(max(ratio, 0.8), 1.2))
        loss -= w * (a * new if algorithm == "reinforce" else clipped)
    assert got == pytest.approx(loss, abs=1e-5)


def test_a_vocabulary_head_is_above_what_the_policy_expects_of_it():
    torch.manual_seed(0)
    actor, q_model = (load_policy("scratch:demo", TOKENIZER) for _ in range(2))
    config = config_of("qrm-vocab", temperature=0.7, min_std_share=0.0)
    stream = VocabularyQ(VocabularyScorer(q_model), Policy(actor), config, kl_coef=0.0)
    responses = answers_of([(4, [1]), (3, [2])])
    packed = packed_of(responses)
    with torch.no_grad():
        got = stream.of_tokens(packed).advantages
        expected = []
        for response in responses:
            ids = torch.tensor([[2, *response]])
            for model in (actor, q_model):
                model.set_attn_implementation("sdpa")
            z, q = (model(ids, use_cache=False).logits[0, :-1].double() for model in (actor, q_model))
            p = (z / 0.7).softmax(-1)
            expected.append(q.gather(1, ids[0, 1:, None])[:, 0] - (p * q).sum(-1))
    expected = torch.cat(expected)
    torch.testing.assert_close(got.double(), expected / expected.std(correction=0), rtol=0, atol=1e-4)


def test_prime_steps_towards_the_verifier_and_credits_by_what_came_out(monkeypatch):
    """The step's gradient and the credit, against transformers' own forward; the answer without a label has no part."""
    torch.manual_seed(0)
    phi, reference = (load_policy("scratch:demo", TOKENIZER) for _ in range(2))
    config = config_of("prime", implicit_lr=1e-2, gamma=0.9, kl_coef=0.1, kl_in="reward", kl_estimator="k1")
    verifier, stepped, step = Verifier(TOKENIZER, config), [], AdamW.step
    monkeypatch.setattr(
        AdamW,
        "step",
        lambda optimizer, *lr: stepped.append([p.grad.clone() for p in optimizer.parameters]) or step(optimizer, *lr),
    )
    responses = [*TWO, TWO[0]]
    prime = Prime(Policy(phi), Policy(reference.requires_grad_(False)), 0.5, config, 0.1, verifier)
    tell(verifier, responses, [0, 1, None], groups=[0, 0, 1])
    packed = packed_of(responses, groups=[0, 0, 1], ref_logprobs=[-1.1] * 11)
    before = load_policy("scratch:demo", TOKENIZER)
    before.load_state_dict(phi.state_dict())
    with torch.no_grad():
        advantages = prime.of_tokens(packed).advantages

    def rewards(model):
        rows = []
        for response in responses:
            ids = torch.tensor([[2, *response]])
            parts = []
            for x in (model, reference):
                x.set_attn_implementation("sdpa")
                logp = x(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
                parts.append(logp.gather(1, ids[0, 1:, None])[:, 0])
            rows.append(0.5 * (parts[0] - parts[1]))
        return rows

    wrong, right, _ = (row.sum() for row in rewards(before))
    loss = (torch.nn.functional.softplus(wrong) + torch.nn.functional.softplus(-right)) / 2
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in before.parameters()])
    got = torch.cat([grad.flatten() for grad in stepped[0]])
    assert len(stepped) == 1 and (got - expected).norm() <= 1e-4 * expected.norm()
    metrics = prime.metrics()
    assert metrics["implicit/loss"].item() == pytest.approx(loss.item(), abs=1e-5)
    assert metrics["implicit/accuracy"].item() == pytest.approx(((wrong <= 0) + (right > 0).float()).item() / 2)

    with torch.no_grad():
        r = [row.tolist() for row in rewards(phi)]
    assert abs(sum(r[0]) - wrong.item()) > 1e-3  # the step has moved it
    means = [sum(row) / len(row) for row in r]
    to_come = []
    for row, others in zip(r, (means[1], means[0], 0.0), strict=True):
        total = [0.0]
        for x in reversed(row):
            total.append(x - others - 0.1 * 0.1 + 0.9 * total[-1])
        to_come += total[:0:-1]
    torch.testing.assert_close(advantages, torch.tensor(to_come), rtol=0, atol=1e-4)


def test_prime_learns_what_is_right_and_not_what_is_short():
    """Both answers are right, and shortened of their reward in part: the labels stay 1."""
    config = config_of("prime", max_new_tokens=4, overlong_tokens=2)
    verifier = Verifier(TOKENIZER, config)
    prime = Prime(Given(torch.full((7,), 1.0)), policy(torch.zeros(7)), 0.5, config, 0.0, verifier)
    assert tell(verifier, TWO, [1, 1]) is not None and verifier.rewards.tolist() == [0.0, 0.5]
    with torch.no_grad():
        prime.of_tokens(packed_of(TWO))
    assert prime.metrics()["implicit/accuracy"].item() == 1.0
    assert prime.loss.item() == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.exp(-1.5))) / 2)


def test_where_prime_takes_no_step_the_policy_takes_none():
    config = config_of("prime")
    verifier, phi = Verifier(TOKENIZER, config), Given(torch.zeros(7))
    phi.level.register_hook(lambda grad: grad * math.inf)
    prime = Prime(phi, policy(torch.zeros(7)), 0.5, config, 0.0, verifier)
    tell(verifier, TWO, [1, 1])
    assert prime.of_tokens(packed_of(TWO)).advantages.isnan().all() and phi.level == 0


# ---- mixtures


def test_a_mixture_is_the_weighted_sum_of_what_each_would_give():
    config = config_of("qrm-paper", reward="q-rm=0.5,verifier=2.0", value_coef=0.0, kl_coef=0.1, min_std_share=0.0)
    packed = packed_of(TWO, ref_logprobs=[-1.1] * 7)
    q = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    q_rm = QRM(lambda batch: q, config, kl_coef=0.1 / 0.5)
    weighted = Weighted({"q-rm": (0.5, q_rm), "verifier": (2.0, Verifier(TOKENIZER, config))}, config)
    assert tell(weighted, TWO, [0, 1]) is None
    advantages, returns = weighted.of_tokens(packed)
    scaled = (q - 4) / 2  # the deviations' squares 9, 4, 1, 0, 1, 4, 9 have mean 4
    expected = 0.5 * scaled - 0.1 * 0.1 + 2 * torch.tensor([-1.0] * 4 + [1.0] * 3)
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(returns, scaled - 0.02, rtol=0, atol=1e-6)
    assert weighted.metrics().keys() == {"reward/q_mean", "reward/q_std", "reward/mean"}
    fresh = QRM(lambda batch: q, config, kl_coef=0.0)
    Weighted({"q-rm": (0.5, fresh), "verifier": (1.0, Verifier(TOKENIZER, config))}, config).load_state_dict(
        weighted.state_dict()
    )
    assert fresh.min_std == q_rm.min_std == 0.0


def test_what_several_streams_report_keeps_their_names():
    config, packed = config_of("qrm-released", min_std_share=0.0), packed_of(TWO)
    scores = {"q-rm": 1.0, "orm": 2.0}
    streams = {name: (1.0, QRM(lambda batch, q=q: torch.full((7,), q), config, 0.0)) for name, q in scores.items()}
    weighted = Weighted({**streams, "verifier": (1.0, Verifier(TOKENIZER, config))}, config)
    tell(weighted, TWO, [0, 1])
    weighted.of_tokens(packed)
    metrics = {name: x.item() for name, x in weighted.metrics().items()}
    deviations = {"reward/q-rm/q_std": 0.0, "reward/orm/q_std": 0.0}
    assert metrics == {"reward/q-rm/q_mean": 1.0, "reward/orm/q_mean": 2.0, "reward/mean": 0.5, **deviations}


@pytest.mark.parametrize(
    ("baseline", "advantages"),
    [("rloo", [-2 / 3, 2 / 3 + 2 / 3, -2 / 3]), ("grpo", [-0.57735, 1.1547, -0.57735]), ("none", [0, 1, 0]),
     ("dr_grpo", [-1 / 3, 2 / 3, -1 / 3])],
)  # fmt: skip
def test_baselines_of_the_verifier(baseline, advantages):
    if baseline == "rloo":
        advantages = [-0.5, 1.0, -0.5]
    verifier = Verifier(TOKENIZER, config_of("rloo", baseline=baseline))
    got = tell(verifier, answers_of([(2, [1])] * 5), [0, 1, 0, None, None], groups=[0, 0, 0, 1, 1])
    torch.testing.assert_close(got, torch.tensor([*advantages, 0.0, 0.0]), rtol=0, atol=1e-4)


def test_a_reward_in_one_line():
    assert parse_streams("pure=1.0, verifier=.5") == {"pure": 1.0, "verifier": 0.5}
    assert parse_streams("q-rm") == {"q-rm": 1.0}
    for reward, sentence in (
        ("fame", r"reward must be one of q-rm, .*, or a mixture such as pure=1\.0,verifier=1\.0, got fame"),
        ("", "reward must be one of"),
        ("pure,pure", "reward must name each kind once, got pure,pure"),
        ("pure=0", "the weight of pure must be a positive number, got 0 in pure=0"),
        ("pure=nan", "the weight of pure must be a positive number, got nan"),
        ("pure=", "the weight of pure must be a positive number, got  in"),
        ("pure=much", "the weight of pure must be a positive number, got much"),
    ):
        with pytest.raises(ValueError, match=sentence):
            parse_streams(reward)


def test_a_score_that_is_not_finite_stays_with_its_answer():
    """NaN in one step: its own answer's advantages alone; the baseline of the other leaves it out."""
    config = replace(config_of("pure-paper"), operator="soft")
    got = process_of(config, [math.nan, -0.2, 0.4]).of_tokens(packed_of(TWO)).advantages
    assert got[:4].isnan().all() and got[4:].tolist() == pytest.approx([0.4] * 3)
