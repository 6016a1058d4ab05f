"""Block hashes: equal exactly when everything the KV depends on is equal."""

import itertools

import pytest

from mini_vllm.core.block_pool import (
    NONE_HASH,
    encode_extra_key,
    extend_block_hashes,
    extra_keys,
    hash_block_tokens,
)
from mini_vllm.request import LoRARequest, MultiModalFeature, Request
from mini_vllm.sampling_params import SamplingParams
from tests.core.harness import make_request


def hashes(request: Request, block_size: int = 4) -> list[bytes]:
    return list(extend_block_hashes(request, request.num_tokens // block_size, block_size))


def image_request(*features: MultiModalFeature) -> Request:
    return Request("mm", range(16), SamplingParams(), mm_features=features)


def test_a_hash_covers_everything_before_its_block() -> None:
    a = hashes(make_request("a", [1, 2, 3, 4, 5, 6, 7, 8]))
    b = hashes(make_request("b", [9, 2, 3, 4, 5, 6, 7, 8]))
    assert a[0] != b[0]
    assert a[1] != b[1], "equal tokens after different parents are different KV"
    assert a[1] == hash_block_tokens(a[0], [5, 6, 7, 8])
    assert a[1] != hash_block_tokens(None, [5, 6, 7, 8])


def test_no_parent_is_a_fixed_parent() -> None:
    assert hash_block_tokens(None, [1, 2]) == hash_block_tokens(NONE_HASH, [1, 2])


def test_hashes_do_not_depend_on_the_process() -> None:
    """SHA-256, not `hash()`: two engines (or two starts) agree, so KV can travel."""
    assert hash_block_tokens(None, [1, 2, 3]).hex().startswith(EXPECTED_PREFIX)


EXPECTED_PREFIX = (
    __import__("hashlib")
    .sha256(bytes(32) + (3).to_bytes(4, "little") + b"".join(t.to_bytes(4, "little") for t in (1, 2, 3)))
    .hexdigest()
)


def test_equal_requests_share_and_each_hash_is_computed_once() -> None:
    request = make_request("a", 12)
    first = hashes(request)
    assert hashes(make_request("b", request.prompt_token_ids)) == first
    assert extend_block_hashes(request, 2, 4) is request.block_hashes
    assert request.block_hashes == first


def test_hashes_grow_with_the_output() -> None:
    request = make_request("a", [1, 2, 3, 4, 5, 6])
    assert len(hashes(request)) == 1
    request.append_output_token(7)
    request.append_output_token(8)
    assert hashes(request) == hashes(make_request("b", [1, 2, 3, 4, 5, 6, 7, 8]))


def test_different_salts_never_share_and_equal_salts_do() -> None:
    tokens = list(range(8))
    plain, a, b, also_a = (
        hashes(make_request(str(i), tokens, cache_salt=s)) for i, s in enumerate((None, "a", "b", "a"))
    )
    assert a == also_a
    for left, right in itertools.combinations((plain, a, b), 2):
        assert not set(left) & set(right)


def test_an_empty_salt_is_a_salt() -> None:
    tokens = list(range(4))
    assert hashes(make_request("a", tokens, cache_salt="")) != hashes(make_request("b", tokens))


def test_a_salt_that_equals_a_lora_name_does_not_collide() -> None:
    tokens = list(range(8))
    salted = hashes(make_request("a", tokens, cache_salt="adapter"))
    adapted = hashes(make_request("b", tokens, lora=LoRARequest("adapter", "/nowhere")))
    assert not set(salted) & set(adapted)


def test_a_reloaded_adapter_does_not_share_with_its_earlier_self() -> None:
    tokens = list(range(4))
    before, after = (hashes(make_request(str(e), tokens, lora=LoRARequest("x", "/n", load_epoch=e))) for e in (0, 1))
    assert before != after


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (("ab", "c"), ("a", "bc")),
        (("a", ""), ("", "a")),
        (("aS\x01\x00\x00\x00b", None), ("a", "b")),
        (("aE0Sb", None), ("a", "bE0")),  # equal when tags and values are simply strung together
    ],
)
def test_adapter_and_salt_cannot_be_cut_differently(
    left: tuple[str, str | None], right: tuple[str, str | None]
) -> None:
    """Length-prefixed keys: no choice of names makes two different pairs encode alike."""
    keys = [
        extra_keys(make_request(name, [1], lora=LoRARequest(name, "/n"), cache_salt=salt), 0, 1)
        for name, salt in (left, right)
    ]
    assert keys[0] != keys[1]


def test_untyped_concatenation_would_collide() -> None:
    """Broken control of the two tests above."""
    assert "ab" + "c" == "a" + "bc"
    assert encode_extra_key(b"L", b"x") != encode_extra_key(b"S", b"x")


def test_an_image_counts_in_every_block_it_touches_and_in_no_other() -> None:
    cat, dog = (image_request(MultiModalFeature(name, offset=5, length=4)) for name in ("cat", "dog"))
    assert [a == b for a, b in zip(hashes(cat), hashes(dog), strict=True)] == [True, False, False, False]
    plain = image_request()
    assert extra_keys(cat, 0, 4) == extra_keys(plain, 0, 4) == b""
    assert extra_keys(cat, 4, 8) and extra_keys(cat, 8, 12)
    assert extra_keys(cat, 12, 16) == b""


def test_the_same_image_one_token_later_is_another_prefix() -> None:
    here, there = (image_request(MultiModalFeature("cat", offset=o, length=2)) for o in (4, 5))
    assert hashes(here)[1] != hashes(there)[1]
