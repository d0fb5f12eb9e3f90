"""What a feature store that shows its bytes in place must do besides what feature_store_suite.py says."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod

import pytest

from paceline.errors import FeatureCorruptError, FeatureMissingError
from paceline.features.store import ViewableFeatureStore
from paceline.testing.feature_store_suite import MIB, FeatureStoreSuite, assert_same, feature_ref, features


class ViewableFeatureStoreSuite(FeatureStoreSuite):
    @abstractmethod
    def make(self, budget_bytes: int = 8 * MIB) -> ViewableFeatureStore:
        """A new, empty store that may both put and get."""

    def test_a_view_shows_the_sealed_bytes_where_they_lie(self) -> None:
        """Two views lie at the same addresses, a copy elsewhere, and what changes there is seen."""
        store = self.make()
        ref = feature_ref("a", store.put("a", features()))
        copy = store.get(ref)
        with store.view(ref) as one, store.view(ref) as other:
            assert_same(one, features())
            for name, tensor in one.items():
                assert tensor.data_ptr() == other[name].data_ptr() != copy[name].data_ptr()
            self.flip_bit(store, ref)
            assert not all(one[name].equal(tensor) for name, tensor in copy.items())

    def test_a_view_leaves_the_sample_as_it_was(self) -> None:
        """Others may come and go meanwhile, and it can be read again."""
        store = self.make()
        store.put("b", features(2))
        ref = feature_ref("a", store.put("a", features(1)))
        with store.view(ref) as tensors:
            store.abort("b")
            store.put("c", features(3))
            assert_same(tensors, features(1))
        assert_same(store.get(ref), features(1))

    @pytest.mark.parametrize("then", ["nothing", "another sample", "the sample again"])
    def test_a_sample_freed_during_a_view_is_missing_at_its_end(self, then: str) -> None:
        """Whatever lies there by then."""
        store = self.make()
        ref = feature_ref("a", store.put("a", features(1)))

        def look() -> None:
            with store.view(ref):
                store.abort("a")
                if then != "nothing":
                    store.put("b" if then == "another sample" else "a", features(1))

        with pytest.raises(FeatureMissingError, match="'a'"):
            look()

    def test_what_fails_in_a_view_of_freed_bytes_is_blamed_on_them(self) -> None:
        """An error may come of other bytes. Not so an interrupt, or an error over bytes that stayed."""
        store = self.make()
        ref = feature_ref("a", store.put("a", features(1)))

        def look(freed: bool, error: type[BaseException]) -> None:
            with store.view(ref):
                if freed:
                    store.abort("a")
                raise error

        with pytest.raises(ZeroDivisionError):
            look(False, ZeroDivisionError)
        with pytest.raises(FeatureMissingError):
            look(True, ZeroDivisionError)
        ref = feature_ref("a", store.put("a", features(1)))
        with pytest.raises(KeyboardInterrupt):
            look(True, KeyboardInterrupt)

    def test_a_view_of_what_is_not_there_is_refused(self) -> None:
        """Freed, damaged, or not what the ref says: before anything is seen."""
        store = self.make()
        freed = feature_ref("a", store.put("a", features(1)))
        store.abort("a")
        damaged = feature_ref("b", store.put("b", features(2)))
        self.flip_bit(store, damaged)
        other = feature_ref("c", store.put("c", features(3)))
        altered = dataclasses.replace(other, metadata={"digest": "0" * 32})
        for ref, error in (
            (freed, FeatureMissingError),
            (damaged, FeatureCorruptError),
            (altered, FeatureCorruptError),
        ):
            with pytest.raises(error), store.view(ref):
                raise AssertionError("seen")
