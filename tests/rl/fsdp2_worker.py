"""One process of test_policy.py's FSDP2 test: `torchrun --nproc-per-node 2 fsdp2_worker.py FOLDER`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from qrm_fast import pack
from qrm_fast.rl.models import load_policy
from qrm_fast.rl.policy import Policy
from qrm_fast.rl.tokenizers import load_tokenizer

SEQUENCES = [[2, 3, 4, 5, 1], [6, 7, 8, 9, 10, 11, 1], [3, 4, 1], [12, 13, 14, 1]]
PROMPT_LENS = [2, 3, 1, 2]

folder = Path(sys.argv[1])
dist.init_process_group("gloo")
rank, num_ranks = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (num_ranks,))
model = load_policy("scratch:demo", load_tokenizer("arithmetic"))
model.load_state_dict(torch.load(folder / "weights.pt"))
policy = Policy(model)
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(policy, mesh=mesh)
register_fsdp_forward_method(policy, "loss")

first, last = 2 * rank, 2 * rank + 2
num_before = sum(len(s) - n for s, n in zip(SEQUENCES[:first], PROMPT_LENS[:first], strict=True))
num_all = sum(map(len, SEQUENCES)) - sum(PROMPT_LENS)
batch = pack(SEQUENCES[first:last], PROMPT_LENS[first:last])
own = slice(num_before, num_before + len(batch.action_index))
logprobs = policy(batch).logprobs.detach()
loss = policy.loss(batch, torch.linspace(-1, 1, num_all)[own], token_weights=torch.full((num_all,), 0.1)[own]).loss
loss.backward()
gathered = [None] * num_ranks
dist.all_gather_object(gathered, (logprobs, loss.detach()))
# FSDP2 takes the mean over ranks; the loss was divided by all actions already
gradients = {name: p.grad.full_tensor() * num_ranks for name, p in policy.named_parameters()}
if rank == 0:
    parts = {"logprobs": [x for x, _ in gathered], "losses": [x for _, x in gathered], "gradients": gradients}
    torch.save(parts, folder / "sharded.pt")
dist.barrier()  # a rank that leaves early may tear down what another still waits for
dist.destroy_process_group()
