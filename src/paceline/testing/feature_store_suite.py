"""Conformance suite for feature stores. Subclass it and define `make` and `flip_bit`; pytest runs it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping

import pytest
import torch

from paceline.errors import FeatureCorruptError, FeatureMissingError, StoreError, StoreFullError
from paceline.features.store import FeatureStore, Sealed
from paceline.types import FeatureSpec, SampleRef, ref_from_json, ref_to_json

MIB = 1 << 20


def feature_ref(sample_id: str, sealed: Sealed) -> SampleRef:
    """The ref a producer would commit, after its way through the metadata store."""
    ref = SampleRef(
        sample_id=sample_id,
        run_id="run0",
        source_task_id=None,
        feature_store_uri=sealed.uri,
        feature_keys=sealed.keys,
        feature_specs=sealed.specs,
        strategy="eagle3",
        estimated_bytes=sealed.num_bytes,
        metadata={"digest": sealed.digest},
    )
    return ref_from_json(ref_to_json(ref))


def features(seed: int = 0, *, num_tokens: int = 7) -> dict[str, torch.Tensor]:
    """Every kind of tensor a capture gives, with values of its own for each seed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(0, 49152, (num_tokens,), generator=generator).to(torch.int32),
        "loss_mask": torch.randint(0, 2, (num_tokens,), generator=generator).to(torch.uint8),
        "aux_hidden_states": torch.randn(num_tokens, 24, generator=generator).to(torch.bfloat16),
        "last_hidden_states": torch.randn(num_tokens, 8, generator=generator),
    }


def bulk(seed: int, num_bytes: int = MIB // 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"bulk": torch.randint(0, 256, (num_bytes,), generator=generator).to(torch.uint8)}


def assert_same(got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert got[name].shape == tensor.shape
        assert torch.equal(_comparable(got[name]), _comparable(tensor))


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of numbers that torch does not compare."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


class FeatureStoreSuite(ABC):
    @abstractmethod
    def make(self, budget_bytes: int = 8 * MIB) -> FeatureStore:
        """A new, empty store that may both put and get."""

    @abstractmethod
    def flip_bit(self, store: FeatureStore, ref: SampleRef) -> None:
        """Change one bit of the sample's sealed payload, past the store's own methods."""

    # -- what goes in comes out ------------------------------------------------------------

    def test_tensors_come_back_bit_for_bit(self) -> None:
        """Names, dtypes, shapes and values of a captured sample survive."""
        store = self.make()
        ref = feature_ref("a", store.put("a", features()))
        assert_same(store.get(ref), features())

    def test_odd_shapes_and_every_dtype_come_back(self) -> None:
        """Scalars, empty dimensions, transposed views and bit patterns that are no number survive."""
        store = self.make()
        tensors = {
            "scalar": torch.tensor(3.5),
            "empty": torch.empty(0, 5, dtype=torch.bfloat16),
            "empty_in_the_middle": torch.empty(3, 0, 2, dtype=torch.int32),
            "transposed": torch.arange(12, dtype=torch.int64).view(3, 4).T,
            "float16": torch.tensor([1.0, -2.0], dtype=torch.float16),
            "float64": torch.tensor([[1e300]], dtype=torch.float64),
            "float8": torch.tensor([[1.125, -448.0, 2.0**-9]]).to(torch.float8_e4m3fn),
            "mask": torch.tensor([True, False, True]),
            "small": torch.tensor([-1, 2], dtype=torch.int16),
            "with_grad": torch.ones(2, requires_grad=True),
        }
        got = store.get(feature_ref("a", store.put("a", tensors)))
        assert_same(got, {name: tensor.detach() for name, tensor in tensors.items()})
        nan = torch.tensor([0x7FC1, 0x7F80], dtype=torch.int16).view(torch.bfloat16)
        got = store.get(feature_ref("b", store.put("b", {"nan": nan})))
        assert torch.equal(got["nan"].view(torch.int16), nan.view(torch.int16))

    def test_specs_say_what_was_put(self) -> None:
        """The sealed specs and size describe the tensors, so a ref can be judged without the bytes."""
        sealed = self.make().put("a", features(num_tokens=7))
        assert sealed.specs["aux_hidden_states"] == FeatureSpec("aux_hidden_states", (7, 24), "bfloat16")
        assert sealed.specs["input_ids"] == FeatureSpec("input_ids", (7,), "int32")
        assert sealed.keys.keys() == sealed.specs.keys() == features().keys()
        assert sealed.num_bytes >= 7 * (4 + 1 + 48 + 32)

    def test_many_samples_keep_apart(self) -> None:
        """Each ref reads its own sample, whatever lies beside it."""
        store = self.make()
        sizes = {f"s{n}": 1 + 13 * n for n in range(20)}
        refs = [feature_ref(i, store.put(i, features(n, num_tokens=n))) for i, n in sizes.items()]
        for ref in reversed(refs):
            n = sizes[ref.sample_id]
            assert_same(store.get(ref), features(n, num_tokens=n))

    def test_what_cannot_be_stored_is_refused(self) -> None:
        """No tensor at all, a list, a sparse tensor or a complex one is an error and leaves nothing."""
        store = self.make()
        complex_numbers = torch.zeros(2, dtype=torch.complex64)
        for tensors in ({}, {"x": [1.0]}, {"x": torch.eye(2).to_sparse()}, {"x": complex_numbers}):
            with pytest.raises(StoreError, match="'a'"):
                store.put("a", tensors)
        assert store.usage().resident_samples == 0

    # -- immutability ----------------------------------------------------------------------

    def test_a_sealed_sample_does_not_follow_the_callers_tensors(self) -> None:
        """Writing to a tensor after `put`, or to one that `get` gave, changes nothing stored."""
        store = self.make()
        tensors = features()
        ref = feature_ref("a", store.put("a", tensors))
        tensors["last_hidden_states"].zero_()
        store.get(ref)["aux_hidden_states"].zero_()
        assert_same(store.get(ref), features())

    def test_tensors_of_get_outlive_the_sample(self) -> None:
        """They own their memory: freeing the sample and reusing its place does not change them."""
        store = self.make()
        got = store.get(feature_ref("a", store.put("a", features(1))))
        store.free([("a", 0)])
        store.put("b", features(2))
        assert_same(got, features(1))

    def test_put_is_idempotent(self) -> None:
        """A second put of a sealed id returns the same answer and writes nothing."""
        store = self.make()
        sealed = store.put("a", features(1))
        usage = store.usage()
        assert store.put("a", features(2, num_tokens=9)) == sealed
        assert store.usage() == usage
        assert_same(store.get(feature_ref("a", sealed)), features(1))

    # -- freeing ---------------------------------------------------------------------------

    def test_freeing_is_idempotent(self) -> None:
        """Freeing twice, or what was never there, is no error and frees nothing else."""
        store = self.make()
        store.put("a", features(1))
        ref = feature_ref("b", store.put("b", features(2)))
        for sample_id in ("a", "a", "nobody"):
            store.free([(sample_id, 0)])
        assert store.usage().resident_samples == 1
        assert_same(store.get(ref), features(2))

    def test_what_was_freed_is_missing(self) -> None:
        """The error says which sample and what to do."""
        store = self.make()
        ref = feature_ref("a", store.put("a", features()))
        store.free([("a", 0)])
        with pytest.raises(FeatureMissingError, match=r"'a'.*paceline produce"):
            store.get(ref)

    def test_a_stale_ref_never_reads_another_sample(self) -> None:
        """Not even when another sample has taken the place, with tensors of the same shape."""
        store = self.make()
        stale = feature_ref("a", store.put("a", features(1)))
        store.free([("a", 0)])
        fresh = feature_ref("b", store.put("b", features(2)))
        with pytest.raises(FeatureMissingError):
            store.get(stale)
        assert_same(store.get(fresh), features(2))

    def test_a_stale_ref_does_not_read_a_later_put_of_its_own_id(self) -> None:
        """A sample captured again has a new ref; the old one stays missing."""
        store = self.make()
        stale = feature_ref("a", store.put("a", features(1)))
        store.free([("a", 0)])
        fresh = feature_ref("a", store.put("a", features(2)))
        with pytest.raises(FeatureMissingError):
            store.get(stale)
        assert_same(store.get(fresh), features(2))

    def test_a_ref_of_another_store_is_missing(self) -> None:
        """Equal keys in two stores do not name the same bytes."""
        one, other = self.make(), self.make()
        ref = feature_ref("a", one.put("a", features(1)))
        other.put("a", features(1))
        with pytest.raises(FeatureMissingError):
            other.get(ref)

    def test_what_is_listed_can_be_freed(self) -> None:
        """One by one, as it was listed; all else can still be read."""
        store = self.make()
        refs = {i: feature_ref(i, store.put(i, features(n))) for n, i in enumerate("abcd")}
        listed = store.written()
        if listed is None:
            pytest.skip("this store cannot list what lies in it")
        assert sorted(sample_id for sample_id, _ in listed) == ["a", "b", "c", "d"]
        store.free([one for one in listed if one[0] in "ac"])
        assert sorted(store.written() or []) == [one for one in sorted(listed) if one[0] in "bd"]
        assert store.usage().resident_samples == 2
        assert_same(store.get(refs["b"]), features(1))
        with pytest.raises(FeatureMissingError):
            store.get(refs["a"])

    # -- generations -----------------------------------------------------------------------

    def test_a_new_generation_replaces_the_bytes_before(self) -> None:
        """A sample captured again lies once; the ref of the old bytes is missing."""
        store = self.make()
        old = feature_ref("a", store.put("a", features(1), generation=5))
        assert store.put("a", features(3), generation=5).keys == old.feature_keys
        new = feature_ref("a", store.put("a", features(2), generation=8))
        assert_same(store.get(new), features(2))
        with pytest.raises(FeatureMissingError):
            store.get(old)
        assert store.usage().resident_samples == 1

    def test_bytes_of_an_older_generation_are_refused(self) -> None:
        """A producer that was taken over cannot replace what its successor captured."""
        store = self.make()
        new = feature_ref("a", store.put("a", features(2), generation=8))
        with pytest.raises(StoreError, match="generation 8"):
            store.put("a", features(1), generation=5)
        assert_same(store.get(new), features(2))

    def test_freeing_an_older_generation_frees_nothing(self) -> None:
        """A deleter that was taken over cannot free what was captured since."""
        store = self.make()
        ref = feature_ref("a", store.put("a", features(2), generation=8))
        store.free([("a", 5)])
        assert_same(store.get(ref), features(2))
        store.free([("a", 8)])
        assert store.usage().resident_samples == 0

    def test_the_generations_that_lie_here_are_listed(self) -> None:
        """A ledger that is an older copy learns from them which numbers it must not give out again."""
        store = self.make()
        if store.written() is None:
            pytest.skip("this store cannot list what lies in it")
        assert list(store.written() or []) == []
        for generation, sample_id in ((2, "a"), (7, "b")):
            store.put(sample_id, features(generation), generation=generation)
        assert sorted(store.written() or []) == [("a", 2), ("b", 7)]
        store.free([("b", 7)])
        assert list(store.written() or []) == [("a", 2)]

    # -- damage ----------------------------------------------------------------------------

    def test_a_flipped_bit_is_found(self) -> None:
        """One bit of the sealed payload is enough; other samples are not touched."""
        store = self.make()
        ref = feature_ref("a", store.put("a", features(1)))
        other = feature_ref("b", store.put("b", features(2)))
        self.flip_bit(store, ref)
        with pytest.raises(FeatureCorruptError, match="'a'"):
            store.get(ref)
        assert_same(store.get(other), features(2))

    def test_a_damaged_sample_can_be_replaced(self) -> None:
        """After it was freed and put again the new ref reads sound bytes."""
        store = self.make()
        self.flip_bit(store, feature_ref("a", store.put("a", features(1))))
        store.free([("a", 0)])
        assert_same(store.get(feature_ref("a", store.put("a", features(1)))), features(1))

    def test_a_ref_with_another_digest_or_spec_is_refused(self) -> None:
        """A ref that was altered on its way does not yield tensors."""
        store = self.make()
        ref = feature_ref("a", store.put("a", features()))
        specs = dict(ref.feature_specs)
        specs["last_hidden_states"] = FeatureSpec("last_hidden_states", (8, 7), "float32")
        alien = {**ref.feature_specs, "loss_mask": FeatureSpec("loss_mask", (7,), "quaternion")}
        for altered in (
            dataclasses.replace(ref, metadata={"digest": "0" * 32}),
            dataclasses.replace(ref, metadata={}),
            dataclasses.replace(ref, feature_specs=specs),
            dataclasses.replace(ref, feature_specs=alien),
        ):
            with pytest.raises(FeatureCorruptError):
                store.get(altered)

    # -- the budget ------------------------------------------------------------------------

    def fill(self, store: FeatureStore) -> list[SampleRef]:
        """Samples s0, s1, ... of `bulk` until the store is full; their refs."""
        refs: list[SampleRef] = []
        while len(refs) < 100:
            sample_id = f"s{len(refs)}"
            try:
                refs.append(feature_ref(sample_id, store.put(sample_id, bulk(len(refs)))))
            except StoreFullError:
                return refs
        raise AssertionError("the budget does not bound the store")

    def test_a_full_store_refuses_and_holds_nothing_new(self) -> None:
        """The refusal names the sample's size and advises; what was sealed before stays readable."""
        store = self.make(budget_bytes=MIB)
        refs = self.fill(store)
        before = store.usage()
        with pytest.raises(StoreFullError, match="Next:"):
            store.put("one more", bulk(99))
        assert store.usage() == before
        assert before.resident_bytes <= before.budget_bytes == MIB
        assert len(refs) == before.resident_samples >= 4
        for number, ref in enumerate(refs):
            assert_same(store.get(ref), bulk(number))

    def test_a_full_store_has_room_again_once_some_is_freed(self) -> None:
        """Freed bytes serve the next sample, of the same size or of another."""
        store = self.make(budget_bytes=MIB)
        self.fill(store)
        store.free([("s0", 0)])
        assert_same(store.get(feature_ref("again", store.put("again", bulk(99)))), bulk(99))
        for number in range(20):
            store.free([(f"s{number}", 0)])
        store.free([("again", 0)])
        large = bulk(7, num_bytes=MIB // 2)
        assert_same(store.get(feature_ref("large", store.put("large", large))), large)

    def test_usage_returns_to_zero(self) -> None:
        """Every byte counted at `put` is discounted when the sample is freed."""
        store = self.make()
        assert (store.usage().resident_bytes, store.usage().resident_samples) == (0, 0)
        sizes = [store.put(f"s{n}", features(n, num_tokens=1 + 100 * n)).num_bytes for n in range(6)]
        assert store.usage().resident_samples == 6
        assert store.usage().resident_bytes >= sum(sizes)
        for n in range(3):
            store.free([(f"s{n}", 0)])
        store.free([(f"s{n}", 0) for n in range(3, 6)])
        assert (store.usage().resident_bytes, store.usage().resident_samples) == (0, 0)

    def test_destroy_gives_everything_back(self) -> None:
        """It may be called twice."""
        store = self.make()
        store.put("a", features())
        store.destroy()
        store.destroy()
