"""What pscope must agree with, computed without it: one row, one whole prompt, one hook, no cache."""

import torch


@torch.no_grad()
def hidden_states(hf, decoder_layers, ids):
    """Residual streams 0..L of one prompt, (L + 1, tokens, hidden), caught layer by layer."""
    caught = []
    handles = [decoder_layers[0].register_forward_pre_hook(lambda _, args: caught.append(args[0][0].clone()))]
    for layer in decoder_layers:
        handles.append(layer.register_forward_hook(lambda _, args, output: caught.append(_tensor(output)[0].clone())))
    hf(torch.tensor([list(ids)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(caught)


def patched_logits(hf, decoder_layers, ids, position, layer, state):
    """The logits at every token, (tokens, vocab), when `state` stands at `position` of residual stream `layer`."""
    return written_logits(hf, decoder_layers, ids, [(layer, position, state)])


@torch.no_grad()
def written_logits(hf, decoder_layers, ids, writes):
    """The logits at every token, (tokens, vocab), when vectors stand where (layer, position, vector) says."""
    handles = []
    for layer, position, vector in writes:

        def write(stream, position=position, vector=vector):
            stream = stream.clone()
            stream[0, position] = vector
            return stream

        def after(_, args, output, write=write):
            return write(output) if isinstance(output, torch.Tensor) else (write(output[0]), *output[1:])

        def before(_, args, write=write):
            return (write(args[0]), *args[1:])

        handles.append(
            decoder_layers[layer - 1].register_forward_hook(after)
            if layer
            else decoder_layers[0].register_forward_pre_hook(before)
        )
    try:
        return hf(torch.tensor([list(ids)]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def written_continuation(hf, decoder_layers, ids, writes, new_tokens):
    """Greedy continuation: the whole prompt is run again for every token, with all that is written into it."""
    ids = list(ids)
    for _ in range(new_tokens):
        ids.append(written_logits(hf, decoder_layers, ids, writes)[-1].argmax().item())
    return ids[-new_tokens:]


def patched_continuation(hf, decoder_layers, ids, position, layer, state, new_tokens, end_tokens=()):
    """Greedy continuation: the whole patched prompt is run again for every token."""
    ids, spoken = list(ids), []
    for _ in range(new_tokens):
        token = patched_logits(hf, decoder_layers, ids, position, layer, state)[-1].argmax().item()
        ids.append(token)
        spoken.append(token)
        if token in end_tokens:
            break
    return spoken


def logits_at_each_step(hf, decoder_layers, ids, position, layer, state, spoken):
    """The logits from which a greedy loop would choose each token of `spoken`, and one more: (spoken + 1, vocab).

    By causality, one pass over all of it tells.
    """
    return patched_logits(hf, decoder_layers, [*ids, *spoken], position, layer, state)[len(ids) - 1 :]


def _tensor(output):
    return output if isinstance(output, torch.Tensor) else output[0]
