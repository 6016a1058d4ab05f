"""Whole models against transformers in float32: teacher-forced logits and greedy tokens, over a paged cache.

Weights are scaled up, so every control (no rotation, other base, other head groups, dropped bias, untied head) is
far outside the tolerance that the right model meets.
"""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from mini_vllm.config import LoadConfig, ModelConfig
from mini_vllm.exceptions import CheckpointError, UnsupportedModelError
from mini_vllm.hf_config import HFConfig, RopeConfig
from mini_vllm.layers.attention import Attention, get_attention_layers
from mini_vllm.models import llama
from mini_vllm.models.loader import load_model
from tests.checkpoints import make_checkpoint
from tests.paged import PagedDriver

TOLERANCE = 2e-4
BROKEN = 0.2
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
WINDOWED = {"use_sliding_window": True, "sliding_window": 8}
VARIANTS = {
    "llama": {},
    "llama-mha": {"num_kv_heads": 4},
    "llama-mqa-wide-heads": {"num_kv_heads": 1, "head_dim": 24},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-rope-llama3": {"rope_scaling": LLAMA3, "rope_theta": 5e5, "new_spelling": True},
    "llama-rope-linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama-odd-vocabulary": {"vocab_size": 131, "num_shards": 3},
    "qwen2": {"family": "qwen2"},
    "qwen2-tied": {"family": "qwen2", "tie_word_embeddings": True, "rope_theta": 1e6},
    "qwen2-window": {
        "family": "qwen2",
        "config_overrides": WINDOWED | {"max_window_layers": 1},
    },
    "qwen2-window-off": {
        "family": "qwen2",
        "config_overrides": {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1},
    },
}
LENGTHS = (37, 1, 16, 17, 50)


@dataclasses.dataclass
class Oracle:
    """A checkpoint, its config, prompts of mixed length and transformers' logits for each."""

    folder: str
    config: HFConfig
    prompts: list[list[int]]
    logits: list[torch.Tensor]
    hf_model: torch.nn.Module

    def model(self, **config_changes) -> torch.nn.Module:
        return load(self.folder, dataclasses.replace(self.config, **config_changes))

    def error(self, model, batches=None) -> float:
        """Largest distance of any logit, one-shot in a flat batch unless `batches` says otherwise."""
        outputs = run(PagedDriver(model), self.prompts, batches or [range(10**9)])
        return max(float((o - r).abs().max()) for o, r in zip(outputs, self.logits, strict=True))


def load(folder, config, dtype="float32"):
    return load_model(ModelConfig(str(folder), config, dtype, None), LoadConfig(use_tqdm=False), torch.device("cpu"))


def run(driver, prompts, spans):
    """Feed each span of token positions of all prompts as one flat batch; each prompt's logits."""
    outputs = [[] for _ in prompts]
    for span in spans:
        batch = [(i, p[span.start : span.stop]) for i, p in enumerate(prompts) if p[span.start : span.stop]]
        for (i, _), logits in zip(batch, driver.step(batch), strict=True):
            outputs[i].append(logits)
    return [torch.cat(parts) for parts in outputs]


@pytest.fixture(scope="session")
def oracle(tmp_path_factory):
    made = {}

    def get(name) -> Oracle:
        if name not in made:
            folder = make_checkpoint(tmp_path_factory.mktemp(name), tokenizer=False, num_layers=3, **VARIANTS[name])
            config = HFConfig.from_folder(folder)
            generator = torch.Generator().manual_seed(7)
            prompts = [torch.randint(0, config.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]
            hf_model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
            with torch.inference_mode():
                logits = [hf_model(torch.tensor([prompt])).logits[0] for prompt in prompts]
            made[name] = Oracle(str(folder), config, prompts, logits, hf_model)
        return made[name]

    return get


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_of_a_mixed_flat_batch_equal_transformers(oracle, name):
    o = oracle(name)
    assert o.error(o.model()) < TOLERANCE


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_computed_in_chunks_among_decodes_equal_transformers(oracle, name):
    o = oracle(name)
    spans = [range(9), range(9, 10), range(10, 17), range(17, 18), range(18, 49), range(49, 50)]
    assert o.error(o.model(), spans) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "qwen2-window"])
def test_a_prompt_alone_and_one_token_at_a_time_equals_transformers(oracle, name):
    o = oracle(name)
    driver = PagedDriver(o.model())
    outputs = run(driver, o.prompts[:1], [range(i, i + 1) for i in range(LENGTHS[0])])
    assert float((outputs[0] - o.logits[0]).abs().max()) < TOLERANCE


@pytest.mark.parametrize("block_size", [1, 8, 16, 32])
def test_block_size_does_not_change_logits(oracle, block_size):
    o = oracle("llama")
    driver = PagedDriver(o.model(), block_size=block_size, seed=block_size)
    outputs = run(driver, o.prompts, [range(13), range(13, 30), range(30, 50)])
    assert max(float((a - b).abs().max()) for a, b in zip(outputs, o.logits, strict=True)) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2"])
def test_greedy_tokens_equal_transformers_alone_and_in_a_batch(oracle, name):
    o, steps = oracle(name), 16
    expected = [their_greedy(o.hf_model, prompt, steps) for prompt in o.prompts]
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    model = o.model()
    for group in ([0], [1], range(len(o.prompts))):
        prompts = [o.prompts[i] for i in group]
        assert greedy(PagedDriver(model), prompts, steps) == [expected[i] for i in group]


@torch.inference_mode()
def their_greedy(hf_model, prompt, steps):
    """Greedy without any cache: nothing to get wrong."""
    tokens = list(prompt)
    for _ in range(steps):
        tokens.append(int(hf_model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def greedy(driver, prompts, steps):
    tokens, feeds = [[] for _ in prompts], prompts
    for _ in range(steps):
        logits = driver.step(list(enumerate(feeds)))
        feeds = [[int(rows[-1].argmax())] for rows in logits]
        for out, feed in zip(tokens, feeds, strict=True):
            out += feed
    return tokens


def test_embeddings_may_be_given_instead_of_token_ids(oracle):
    model = oracle("llama").model()
    ids, positions = torch.tensor(oracle("llama").prompts[0]), torch.arange(LENGTHS[0])
    embeds = model.embed_input_ids(ids)
    driver, original = PagedDriver(model), model.forward
    from_ids = driver.step([(0, ids.tolist())])[0]
    model.forward = lambda *_: original(None, positions, None, embeds)
    from_embeds = PagedDriver(model).step([(0, ids.tolist())])[0]
    assert from_ids.equal(from_embeds)


def test_a_bfloat16_model_is_near_the_float32_one_and_packed(oracle):
    o = oracle("qwen2")
    model = load(o.folder, o.config, "bfloat16")
    outputs = run(PagedDriver(model), o.prompts, [range(40), range(40, 50)])
    spread = o.logits[0].std()
    assert max(float((a - b).abs().mean()) for a, b in zip(outputs, o.logits, strict=True)) < 0.1 * spread
    agree = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(outputs, o.logits, strict=True)])
    assert agree.float().mean() > 0.9


# --- controls: the comparison must fail when a feature is broken ---------------------------------------


def test_control_no_rotation_fails(oracle, monkeypatch):
    o = oracle("llama")
    monkeypatch.setattr(llama, "apply_rotary", lambda x, cos_sin: x)
    assert o.error(o.model()) > BROKEN


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("llama", RopeConfig(theta=5e5)),
        ("qwen2-tied", RopeConfig(theta=1e4)),
        ("llama-rope-llama3", RopeConfig(theta=5e5)),
        ("llama-rope-linear", RopeConfig()),
        ("llama-rope-linear", RopeConfig("linear", scaling={"factor": 3.0})),
    ],
)
def test_control_another_rotary_base_or_scaling_fails(oracle, name, wrong):
    o = oracle(name)
    assert o.error(o.model(rope=wrong)) > BROKEN


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_control_interleaved_head_groups_fail(oracle, name, monkeypatch):
    o, forward = oracle(name), Attention.forward

    def interleaved(self, query, key, value):
        order = torch.arange(self.num_heads).view(-1, self.num_kv_heads).T.reshape(-1)
        heads = query.view(-1, self.num_heads, self.head_size)[:, order].reshape(query.shape)
        output = forward(self, heads, key, value).view(-1, self.num_heads, self.head_size)
        return output[:, order.argsort()].reshape(query.shape)

    monkeypatch.setattr(Attention, "forward", interleaved)
    assert o.error(o.model()) > BROKEN


@pytest.mark.parametrize(
    ("name", "layer", "part"),
    [
        ("qwen2", "qkv_proj", 0), ("qwen2", "qkv_proj", 2), ("llama-biases", "qkv_proj", 0),
        ("llama-biases", "o_proj", 0), ("llama-biases", "gate_up_proj", 1), ("llama-biases", "down_proj", 0),
    ],
)  # fmt: skip
def test_control_a_dropped_bias_fails(oracle, name, layer, part):
    o = oracle(name)
    model = o.model()
    module = next(m for n, m in model.named_modules() if n.endswith(layer))
    module.bias.data.split(module.output_partition_sizes)[part].zero_()
    assert o.error(model) > BROKEN


@pytest.mark.parametrize("name", ["llama-tied", "qwen2-tied"])
@pytest.mark.usefixtures("plain_weights")
def test_control_an_untied_head_fails(oracle, name):
    o = oracle(name)
    model = o.model()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.roll(1, 0), requires_grad=False)
    assert o.error(model) > BROKEN


def test_control_another_window_fails(oracle):
    o = oracle("qwen2-window")
    assert o.error(o.model(sliding_window=9)) > BROKEN
    assert o.error(o.model(sliding_window=None)) > BROKEN


def test_control_shared_blocks_fail(oracle):
    o = oracle("llama")
    driver = PagedDriver(o.model())
    driver.block_table[1:] = driver.block_table[:-1]
    outputs = run(driver, o.prompts, [range(10), range(10, 50)])
    assert max(float((a - b).abs().max()) for a, b in zip(outputs, o.logits, strict=True)) > BROKEN


# --- options that would change results are built or refused ---------------------------------------------


def test_qwen2_windows_follow_max_window_layers_or_layer_types(tmp_path):
    for options, expected in (
        ({"max_window_layers": 1}, [None, 8, 8]),
        ({"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}, [8, None, 8]),
        ({}, [None, None, None]),  # the default of max_window_layers is above this depth
    ):
        folder = make_checkpoint(tmp_path, "qwen2", tokenizer=False, num_layers=3, config_overrides=WINDOWED | options)
        layers = get_attention_layers(load(folder, HFConfig.from_folder(folder)))
        assert [layer.sliding_window for layer in layers.values()] == expected


@pytest.mark.parametrize(
    ("family", "options", "error", "named"),
    [
        ("llama", {"hidden_act": "relu"}, UnsupportedModelError, "hidden_act 'relu'"),
        ("llama", {"sliding_window": 16}, UnsupportedModelError, "sliding_window=16 is not supported.*'llama'"),
        ("qwen2", {"mlp_bias": True}, UnsupportedModelError, "mlp_bias=True is not supported.*'qwen2'"),
        ("qwen2", WINDOWED | {"layer_types": ["odd"] * 2}, CheckpointError, "layer_types"),
        ("qwen2", WINDOWED | {"layer_types": 3}, CheckpointError, "layer_types"),
        ("qwen2", WINDOWED | {"max_window_layers": "x"}, CheckpointError, "max_window_layers must be an integer"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, UnsupportedModelError, "'gptq'"),
        ("llama", {"architectures": ["OddForCausalLM"]}, UnsupportedModelError, r"OddForCausalLM.*Llama"),
    ],
)  # fmt: skip
def test_options_that_would_change_results_are_refused_by_name(tmp_path, family, options, error, named):
    folder = make_checkpoint(tmp_path, family, tokenizer=False, config_overrides=options)
    with pytest.raises(error, match=named):
        load(folder, HFConfig.from_folder(folder))
