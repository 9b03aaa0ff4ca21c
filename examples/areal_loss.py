"""AReaL: its engines' `train_batch(input_, loss_fn, loss_weight_fn)` on packed rows, which is our layout already.

    engine.train_batch(batch, functools.partial(qrm_loss, kind="cispo"), num_trained_tokens)

`loss_fn` gets log-probabilities and entropy [T] of a packed micro-batch and its data; it returns the mean over the
trained tokens, which AReaL weighs by `loss_weight_fn`.
"""

from qrm_fast import loss_weights, policy_loss


def qrm_loss(logprobs, entropy, input_data, *, vocab_min_logits=None, vocab_max_logits=None, **options):
    """`options` are those of `policy_loss`; the extreme logits, which AReaL hands over for its log, are not used.

    Weights of the decoupled loss, between `prox_logp` and the policy that sampled, would be factors of the advantages.
    """
    cu_seqlens = input_data["cu_seqlens"]
    if options.get("kind") == "gspo":
        options["cu_seqlens"] = cu_seqlens
    old = input_data.get("prox_logp")  # of the policy before this update, where that is not the one that sampled
    return policy_loss(
        logprobs,
        input_data["advantages"].float(),
        entropy=entropy.to(logprobs.dtype),
        old_logprobs=(input_data["logprobs"] if old is None else old).to(logprobs.dtype),
        token_weights=loss_weights(cu_seqlens, mask=input_data["loss_mask"].bool()),
        **options,
    ).loss


def num_trained_tokens(input_data):
    return input_data["loss_mask"].count_nonzero()
