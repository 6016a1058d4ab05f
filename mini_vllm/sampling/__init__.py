"""From logits to tokens: the batched sampler, its random numbers, and the teaching sampler."""
