"""A recorded forward, replayed for any number of tokens, gives what running it gives, to the last bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_vllm.ops.activation import act_and_mul
from mini_vllm.ops.cpu import library
from mini_vllm.ops.cpu.recording import Arena, CannotRecord, NativeStretch, TooManyBreaks, TorchCall, record
from mini_vllm.ops.lookup import lookup
from mini_vllm.ops.norm import layer_norm, rms_norm
from mini_vllm.ops.rotary import apply_rotary, rotary_angles

pytestmark = pytest.mark.skipif(not library.available(), reason="no native kernels here")

MOST = 24
WIDTH = 32


class Net:
    """A forward out of kernels, with operators of torch between them where `breaks` says so."""

    def __init__(self, dtype=torch.float32, breaks=(), layers=3):
        rng = torch.Generator().manual_seed(0)
        self.table = torch.randn(50, WIDTH, generator=rng).to(dtype)
        self.gain = torch.rand(WIDTH, generator=rng).to(dtype) + 0.5
        self.mix = torch.randn(WIDTH, 2 * WIDTH, generator=rng).to(dtype) / 6
        self.inv_freq = 100.0 ** (-torch.arange(4) / 4)
        self.breaks, self.layers = breaks, layers

    def __call__(self, ids, positions):
        hidden, residual = lookup(ids, self.table), None
        angles = rotary_angles(positions, self.inv_freq, 1.0)
        for layer in range(self.layers):
            hidden, residual = rms_norm(hidden, residual, self.gain, 1e-6)
            heads = rms_norm(hidden.view(len(hidden), -1, 8), None, self.gain[:8], 1e-6)[0]
            turned = apply_rotary(heads, angles).flatten(1)
            hidden = layer_norm(hidden, None, self.gain, None, 1e-5)[0]
            if layer in self.breaks:
                hidden = self.torch_part(hidden, turned, residual)
        return hidden

    def torch_part(self, hidden, turned, residual):
        wide = act_and_mul(hidden @ self.mix, "silu")
        wide[:, :8] += turned[:, 16:24]
        first, second = wide.split([16, 16], -1)
        residual.add_(1)
        return torch.cat((second, first), -1) + residual.mean(1, keepdim=True)


def buffers(most=MOST):
    return torch.zeros(most, dtype=torch.int32), torch.zeros(most, dtype=torch.int64)


def fill(ids, positions, tokens, seed):
    rng = torch.Generator().manual_seed(seed)
    ids[:tokens] = torch.randint(0, 50, (tokens,), generator=rng, dtype=torch.int32)
    positions[:tokens] = torch.randint(0, 1000, (tokens,), generator=rng)


def recorded(net, most=MOST):
    inputs = buffers(most)
    with torch.inference_mode(), record(most, inputs) as recording:
        result = net(*inputs)
    pieces = recording.finish()

    @torch.inference_mode()
    def run(tokens, seed):
        fill(*inputs, tokens, seed)
        for piece in pieces:
            piece(tokens)
        return result[:tokens].clone()

    return recording, run


@torch.inference_mode()
def eager(net, tokens, seed):
    ids, positions = (x[:tokens] for x in buffers())
    fill(ids, positions, tokens, seed)
    return net(ids, positions)


@pytest.mark.parametrize("breaks", [(), (1,), (3, 25)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(steps=st.lists(st.tuples(st.integers(1, MOST), st.integers(0, 99)), min_size=1, max_size=6))
@settings(max_examples=15)
def test_a_replay_is_the_forward_for_any_number_of_tokens(dtype, breaks, steps):
    net = Net(dtype, breaks, layers=30 if breaks else 3)
    recording, run = recorded(net)
    assert recording.num_breaks == 7 * len(breaks)
    for tokens, seed in steps:
        assert torch.equal(run(tokens, seed), eager(net, tokens, seed))


def test_control_a_kernel_with_too_few_rows_shows():
    net = Net(breaks=(1,), layers=8)
    recording, run = recorded(net)
    stretch = recording.pieces[0]
    norm_of_heads = [i for i, call in enumerate(stretch._calls) if call.rows_per_token == 4][1]
    stretch._calls[norm_of_heads].rows_per_token = 3
    assert not torch.equal(run(9, 1), eager(net, 9, 1))


def test_without_breaks_everything_is_one_native_call():
    recording, _ = recorded(Net())
    assert [type(piece) for piece in recording.pieces] == [NativeStretch]
    recording, _ = recorded(Net(breaks=(1,), layers=8))
    kinds = [type(piece) for piece in recording.pieces]
    assert kinds.count(TorchCall) == 7 and kinds[0] is kinds[-1] is NativeStretch


def test_a_place_is_used_again_only_when_nothing_lies_there_any_more():
    arena = Arena()
    first = arena.empty((4, 4), torch.float32)
    second = arena.empty((4, 4), torch.float32)
    assert first.data_ptr() != second.data_ptr()
    address, view = first.data_ptr(), first[1:]
    del first
    assert arena.empty((4, 4), torch.float32).data_ptr() != address  # the view is still there
    del view
    assert arena.empty((2, 8), torch.float32).data_ptr() == address
    assert arena.holds(address + 63) and not arena.holds(address + 64 * 1000)


def test_the_arena_of_many_layers_is_that_of_a_few():
    few, many = (recorded(Net(layers=layers))[0].arena.num_bytes for layers in (3, 30))
    assert many == few


def test_control_places_given_away_at_once_show(monkeypatch):
    def empty(self, shape, dtype, real=Arena.empty):
        x = real(self, shape, dtype)
        size = -(-x.nbytes // 64) * 64
        self._free[size].append(next(place for place in self._places if place.ctypes.data == x.data_ptr()))
        return x

    monkeypatch.setattr(Arena, "empty", empty)
    net = Net()
    _, run = recorded(net)
    assert not torch.equal(run(9, 1), eager(net, 9, 1))


def test_a_step_of_the_replay_allocates_no_tensor():
    net = Net()
    inputs = buffers()
    with torch.inference_mode(), record(MOST, inputs) as recording:
        net(*inputs)
    pieces = recording.finish()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for piece in pieces:
            piece(7)
    assert sum(event.cpu_memory_usage for event in profile.key_averages()) == 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = net(*inputs)
    assert sum(event.cpu_memory_usage for event in profile.key_averages()) > 0 and len(kept)


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (lambda x, p: x * float(x[:, 0][3]), "decides on a value"),
        (lambda x, p: x[: int(p[0])], "decides on a value"),
        (lambda x, p: x + torch.arange(MOST).unsqueeze(1), "makes something of the number of tokens"),
        (lambda x, p: x.t() + 1, "not one row or more for each token"),
        (lambda x, p: x.sum(), "not one row or more for each token"),
        (lambda x, p: rms_norm(x[:5], None, torch.ones(WIDTH), 1e-6)[0], "5 rows for 24 tokens"),
    ],
)
def test_what_cannot_be_cut_at_a_number_of_tokens_is_refused(forward, why):
    table = torch.ones(50, WIDTH)
    inputs = buffers()
    with pytest.raises(CannotRecord, match=why), torch.inference_mode(), record(MOST, inputs):
        forward(lookup(inputs[0], table), inputs[1])
    assert lookup(torch.tensor([3]), table).sum() == WIDTH  # what runs now, runs


def test_a_forward_of_torch_is_not_worth_it():
    inputs = buffers()
    with pytest.raises(TooManyBreaks), torch.inference_mode(), record(MOST, inputs):
        x = lookup(inputs[0], torch.ones(50, WIDTH))
        for _ in range(20):
            x = x * 2


def test_an_index_outside_the_table_fails_the_replay_and_says_where():
    inputs, table = buffers(), torch.ones(50, WIDTH)  # a recording holds addresses: the table must live on
    with torch.inference_mode(), record(MOST, inputs) as recording:
        lookup(inputs[0], table)
    inputs[0][1] = 50
    [stretch] = recording.finish()
    stretch(1)
    with pytest.raises(RuntimeError, match="mv_lookup failed in a recorded step of 2 tokens"):
        stretch(2)
