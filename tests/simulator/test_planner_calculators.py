"""The worked numbers of the course's calculators, corrected where they were wrong, as claims about one formula each."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_vllm.exceptions import ConfigError
from mini_vllm.simulator.planner import lora, memory, parallel, roofline, speculation
from mini_vllm.simulator.planner.hardware import LINKS, hardware_preset
from mini_vllm.simulator.planner.presets import preset_geometry

GIB, MIB, KIB = 2**30, 2**20, 2**10
LLAMA_8B_KV = memory.kv_bytes_per_token(32, 8, 128, 2)
A100 = (312e12, 2.0e12)
NVLINK = (450e9, 3e-6)
ETHERNET = (1.25e9, 50e-6)


# --- memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((32, 8, 128), 131_072), ((80, 8, 128), 327_680), ((32, 32, 128), 524_288), ((12, 12, 64), 36_864),
     ((24, 32, 64), 196_608), ((24, 2, 64), 12_288)],
)  # fmt: skip
def test_kv_bytes_per_token(shape, expected):
    assert memory.kv_bytes_per_token(*shape, 2) == expected


def test_a_sequence_of_2048_tokens_takes_256_mib_and_32_of_them_fit_beside_16_gib_of_weights():
    per_seq = memory.kv_bytes_per_seq(2048, LLAMA_8B_KV)
    assert per_seq == 256 * MIB == 268_435_456
    assert memory.max_concurrent_seqs(24 * GIB, 16 * GIB, per_seq) == 32
    assert memory.max_concurrent_seqs(24 * GIB, 16 * GIB, memory.kv_bytes_per_seq(8192, LLAMA_8B_KV)) == 8


def test_an_fp8_cache_doubles_concurrency_and_grouped_heads_quadruple_it():
    fp8 = memory.kv_bytes_per_token(32, 8, 128, 1)
    assert memory.max_concurrent_seqs(24 * GIB, 16 * GIB, 2048 * fp8) == 64
    assert memory.kv_bytes_per_token(32, 32, 128, 2) == 4 * LLAMA_8B_KV


@pytest.mark.parametrize("weights", [24, 30])
def test_without_room_for_weights_there_are_no_sequences_rather_than_fewer_than_none(weights):
    assert memory.max_concurrent_seqs(24 * GIB, weights * GIB, 1) == 0


def test_two_hundred_users_of_4096_tokens_need_100_gib():
    assert memory.kv_bytes_for_users(200, 4096, LLAMA_8B_KV) == 100 * GIB


def test_a_70b_model_on_eight_a100s_holds_186_sequences_of_8k_or_162_at_nine_tenths():
    per_seq = memory.kv_bytes_per_seq(8192, 327_680)
    assert per_seq == 2.5 * GIB
    assert memory.max_concurrent_seqs(640e9, 140e9, per_seq) == 186
    assert memory.max_concurrent_seqs(0.9 * 640e9, 140e9, per_seq) == 162


def test_blocks_of_16_and_what_they_waste():
    assert memory.blocks_for(50, 16) == 4
    assert memory.paging_waste(50, 16) == 14
    assert memory.blocks_for(131_072, 16) == 8192
    assert memory.blocks_for(2031, 16) == 127


@given(st.integers(1, 10**6), st.integers(1, 512))
def test_paging_wastes_less_than_a_block(tokens, block_size):
    assert 0 <= memory.paging_waste(tokens, block_size) < block_size


def test_a_shared_system_prompt_of_4096_tokens_saves_a_factor_of_61():
    alone, shared = (memory.shared_prefix_tokens(1000, 4096, 50, 16, flag) * LLAMA_8B_KV for flag in (False, True))
    assert alone / GIB == pytest.approx(507.8, rel=0.005)
    assert shared / GIB == pytest.approx(8.31, abs=0.01)
    assert alone / shared == pytest.approx(61, abs=0.2)


def test_four_bits_with_a_scale_per_128_are_7_76_times_smaller_than_float32():
    bits = memory.QUANTISATIONS["int4-g128"].bits
    assert bits / 8 == 0.515625
    assert 32 / bits == pytest.approx(7.76, abs=0.005)
    assert 70e9 * bits / 8 == pytest.approx(36.1e9, rel=0.001)


def test_an_embedding_of_50k_by_4096_is_390_mib():
    assert memory.embedding_bytes(50_000, 4096, 2) == 409_600_000


# --- roofline ------------------------------------------------------------------------------------------------


def test_ridge_of_an_a100_is_156_and_of_an_h100_295():
    assert roofline.ridge_point(*A100) == 156.0
    assert hardware_preset("a100-80g").ridge("bfloat16") == 156.0
    assert hardware_preset("h100").ridge("bfloat16") == pytest.approx(295.5, abs=0.05)


def test_intensity_is_tokens_over_bytes_whatever_the_model():
    assert roofline.arithmetic_intensity(2048, 2) == 2048
    assert roofline.compute_utilisation(roofline.arithmetic_intensity(1, 2), 156) == pytest.approx(0.0064, abs=1e-4)


def test_the_critical_batch_is_the_ridge():
    assert roofline.critical_tokens(*A100, 2) == 156
    assert not roofline.is_compute_bound(roofline.arithmetic_intensity(155, 2), 156)
    assert roofline.is_compute_bound(roofline.arithmetic_intensity(156, 2), 156)


@pytest.mark.parametrize(
    ("batch", "bandwidth", "params", "dtype_bytes", "expected"),
    [(1, 2e12, 8e9, 2, 125), (64, 2e12, 8e9, 2, 8000), (1, 3.35e12, 8e9, 2, 209.4), (1, 2e12, 8e9, 0.5, 500),
     (1, 50e9, 0.494e9, 2, 50.6)],
)  # fmt: skip
def test_decode_ceiling(batch, bandwidth, params, dtype_bytes, expected):
    assert roofline.decode_tokens_per_second(batch, bandwidth, params, dtype_bytes) == pytest.approx(expected, abs=0.05)


def test_at_batch_64_the_cache_outweighs_16_gb_of_weights_from_1907_tokens():
    assert int(roofline.context_where_kv_equals_weights(16e9, 64, LLAMA_8B_KV)) == 1907


def test_littles_law():
    assert roofline.concurrency_for(1000, 0.05) == 50
    assert roofline.concurrency_for(2000, 0.03) == 60


# --- tensor and pipeline parallel ----------------------------------------------------------------------------


def test_an_all_reduce_moves_one_row_per_token_and_2_n_minus_1_over_n_of_it_per_rank():
    assert parallel.allreduce_payload_bytes(1, 4096) == 8192
    assert parallel.allreduce_payload_bytes(2048, 4096) == 16 * MIB
    assert parallel.ring_allreduce_traffic_per_rank(100, 2) == 100
    assert parallel.ring_allreduce_traffic_per_rank(100, 8) == 175


@pytest.mark.parametrize(
    ("ranks", "tokens", "link", "milliseconds"),
    [(2, 1, NVLINK, 0.385), (4, 1, NVLINK, 1.154), (8, 1, NVLINK, 2.690), (2, 2048, NVLINK, 2.77),
     (2, 1, ETHERNET, 6.82), (2, 2048, ETHERNET, 865)],
)  # fmt: skip
def test_communication_of_a_step_of_32_layers(ranks, tokens, link, milliseconds):
    seconds = parallel.tp_comm_seconds_per_step(32, tokens, 4096, ranks, *link)
    assert seconds * 1e3 == pytest.approx(milliseconds, rel=0.002)


def test_the_share_of_communication_is_small_on_nvlink_and_fatal_on_ethernet():
    shares = [
        parallel.comm_fraction(parallel.tp_comm_seconds_per_step(32, 1, 4096, 2, *link), 0.008)
        for link in (NVLINK, ETHERNET)
    ]
    assert shares == [pytest.approx(0.046, abs=1e-3), pytest.approx(0.460, abs=1e-3)]
    assert (LINKS["nvlink4"].bytes_per_second, LINKS["nvlink4"].latency_seconds) == NVLINK
    assert (LINKS["ethernet-10g"].bytes_per_second, LINKS["ethernet-10g"].latency_seconds) == ETHERNET


def test_latency_rules_small_payloads_and_bandwidth_large_ones():
    def gain(tokens, change):
        bandwidth, latency = change(*ETHERNET)
        plain = parallel.tp_comm_seconds_per_step(32, tokens, 4096, 2, *ETHERNET)
        return plain / parallel.tp_comm_seconds_per_step(32, tokens, 4096, 2, bandwidth, latency)

    halved_latency, doubled_bandwidth = (lambda b, t: (b, t / 2)), (lambda b, t: (2 * b, t))
    assert gain(1, halved_latency) > gain(1, doubled_bandwidth)
    assert gain(2048, halved_latency) < gain(2048, doubled_bandwidth)


def test_one_rank_pays_nothing():
    assert parallel.tp_comm_seconds_per_step(32, 1, 4096, 1, *ETHERNET) == 0


@given(st.integers(1, 12), st.integers(1, 40))
def test_the_grid_of_a_pipeline_is_idle_by_exactly_the_formula(stages, microbatches):
    grid = parallel.simulate_schedule(stages, microbatches)
    ticks = parallel.pipeline_total_ticks(stages, microbatches)
    assert all(len(row) == ticks for row in grid)
    idle = sum(cell is None for row in grid for cell in row)
    assert idle / (stages * ticks) == pytest.approx(parallel.bubble_fraction(stages, microbatches))
    assert all(sorted(c for c in row if c is not None) == list(range(microbatches)) for row in grid)


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 9), (4, 27), (8, 63), (16, 135), (1, 1)])
def test_microbatches_for_a_bubble_of_a_tenth(stages, microbatches):
    assert parallel.min_microbatches_for_bubble(stages, 0.1) == microbatches
    assert parallel.bubble_fraction(4, 1) == 0.75


def test_interleaving_shrinks_the_bubble():
    assert parallel.bubble_fraction(4, 8) == pytest.approx(0.2727, abs=1e-4)
    assert parallel.interleaved_bubble_fraction(4, 8, 2) == pytest.approx(0.158, abs=1e-3)


def test_pipeline_handovers_are_far_cheaper_than_all_reduces_on_ethernet():
    assert parallel.pipeline_handoff_seconds(8, 1, 4096, *ETHERNET) * 1e3 == pytest.approx(0.396, abs=1e-3)


# --- disaggregation ------------------------------------------------------------------------------------------

PREFILL = 2048 / 10_000


@pytest.mark.parametrize(("gbps", "milliseconds", "toll"), [(200, 10.74, 5.24), (100, 21.5, 10.5), (25, 85.9, 41.9),
                                                            (10, 214.7, 104.9)])  # fmt: skip
def test_the_toll_is_the_payload_over_the_link(gbps, milliseconds, toll):
    payload = parallel.kv_payload_bytes(2048, LLAMA_8B_KV)
    assert payload == 256 * MIB
    seconds = parallel.transfer_seconds(payload, gbps)
    assert seconds * 1e3 == pytest.approx(milliseconds, rel=0.002)
    assert 100 * parallel.disagg_ttft_penalty(seconds, PREFILL) == pytest.approx(toll, rel=0.002)


def test_disaggregation_pays_when_interference_is_heavy_and_the_link_fast():
    fast, slow = (parallel.transfer_seconds(256 * MIB, gbps) for gbps in (200, 10))
    assert parallel.colocated_itl_worst(0.010, 0.025) == pytest.approx(0.035)
    assert parallel.disagg_wins(0.010, 0.025, fast, PREFILL)
    assert not parallel.disagg_wins(0.010, 0.025, slow, PREFILL)
    assert not parallel.disagg_wins(0.010, 0.001, fast, PREFILL)


def test_a_70b_model_ships_two_and_a_half_times_as_much():
    assert parallel.kv_payload_bytes(2048, 327_680) == 640 * MIB == 2.5 * 256 * MIB


def test_overlap_makes_25_gigabit_viable():
    transfer = parallel.transfer_seconds(256 * MIB, 25)
    assert parallel.overlap_needed(transfer, PREFILL, 0.05) == pytest.approx(0.881, abs=1e-3)
    assert parallel.overlap_needed(transfer, PREFILL, 0.06) == pytest.approx(0.857, abs=1e-3)
    assert parallel.overlap_needed(transfer, 10, 0.05) == 0


# --- LoRA ----------------------------------------------------------------------------------------------------


def test_an_adapter_of_rank_16_over_attention_is_32_mib():
    assert lora.lora_params(4096, 4096, 16) == 131_072
    assert lora.adapter_bytes(4096, 32, 16) == 32 * MIB
    assert lora.adapters_per_gib(32 * MIB) == 32
    assert lora.adapter_bytes(4096, 32, 64) == 4 * lora.adapter_bytes(4096, 32, 16)
    assert round(7e9 / (lora.adapter_bytes(4096, 32, 16) / 2), 1) == 417.2


def test_an_adapter_matrix_is_128_times_smaller_and_adds_under_a_percent_of_arithmetic():
    assert lora.shrink_ratio(4096, 4096, 16) == 128
    assert lora.flop_overhead(4096, 4096, 16) == pytest.approx(0.0078, abs=1e-4)


@pytest.mark.parametrize(
    ("preset", "params", "mebibytes"), [("llama-2-7b", 39_976_960, 76.25), ("llama-3-8b", None, 80.0)]
)
def test_all_matrices_with_their_real_shapes(preset, params, mebibytes):
    found = lora.model_adapter_params(preset_geometry(preset), 16)
    assert params is None or found == params
    assert found * 2 / MIB == mebibytes


def test_a_hundred_tenants_on_eight_slots_save_87_machines():
    assert lora.gpus_saved(100, 8) == 87


def test_unknown_targets_are_refused_with_those_there_are():
    with pytest.raises(ConfigError, match="lora_target_modules: llama-3-8b has no qkv; it has q_proj, k_proj"):
        lora.model_adapter_params(preset_geometry("llama-3-8b"), 8, ["qkv"])


# --- speculation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "tokens"), [(0.7, 2.941), (0.75, 3.288), (0.8, 3.689), (0.2, 1.2499), (1.0, 6.0), (0.0, 1.0)]
)
def test_expected_tokens_per_verification_of_five_drafts(alpha, tokens):
    assert speculation.expected_tokens_per_verify(alpha, 5) == pytest.approx(tokens, abs=1e-3)


@pytest.mark.parametrize(("alpha", "c", "expected"), [(0.7, 0.05, 2.353), (0.75, 0.05, 2.630), (0.5, 0.05, 1.575),
                                                      (0.2, 0.5, 0.357)])  # fmt: skip
def test_speedup_with_five_drafts(alpha, c, expected):
    assert speculation.speedup(alpha, 5, c) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("alpha", "c", "best"), [(0.3, 0.05, 2), (0.5, 0.05, 3), (0.6, 0.05, 4), (0.75, 0.05, 7),
                                                  (0.8, 0.05, 8), (0.9, 0.05, 13), (0.3, 0.3, 0), (0.5, 0.3, 1),
                                                  (0.7, 0.3, 2), (0.9, 0.3, 5), (0.2, 0.5, 0)])  # fmt: skip
def test_best_number_of_drafts(alpha, c, best):
    assert speculation.optimal_k(alpha, c) == best


@given(st.floats(0, 0.95), st.floats(0.01, 0.9), st.floats(0, 0.3))
def test_some_number_of_drafts_gains_exactly_when_acceptance_exceeds_their_cost(alpha, c, growth):
    if abs(alpha - c - growth) > 1e-9:
        gains = speculation.speedup(alpha, 1, c, growth) > 1 or speculation.optimal_k(alpha, c, 64, growth) > 0
        assert gains == speculation.speculation_wins(alpha, c, growth)


def test_acceptance_is_recovered_from_tokens_per_cycle():
    assert speculation.acceptance_from_tokens(3.8, 5) == pytest.approx(0.8126, abs=1e-4)
    assert speculation.acceptance_from_tokens(5.0, 5) == pytest.approx(0.927, abs=1e-3)
    assert speculation.ceiling(0.7) == pytest.approx(3.33, abs=0.01)
    with pytest.raises(ConfigError, match=r"tokens_per_cycle: must be in \[1, 6\]"):
        speculation.acceptance_from_tokens(7, 5)
