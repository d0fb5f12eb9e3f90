"""The payload's layout and digest, which every reader of a stored sample relies on."""

from __future__ import annotations

import pytest
import torch
import xxhash

from paceline.features import codec
from paceline.testing.feature_store_suite import assert_same
from paceline.types import FeatureSpec


def digest_of(sample_id: str, tensors: dict[str, torch.Tensor]) -> str:
    layout = codec.layout_of_tensors(sample_id, tensors)
    payload = torch.empty(layout.num_bytes, dtype=torch.uint8)
    return codec.write(layout, codec.describe(sample_id, layout), tensors, payload.numpy().data)


def test_layout_is_aligned_and_ordered_by_name() -> None:
    """Tensors lie in the order of their names, each at a multiple of 64 bytes, without overlap."""
    tensors = {"b": torch.zeros(3), "a": torch.zeros(65, dtype=torch.uint8), "c": torch.zeros(0, 4)}
    layout = codec.layout_of_tensors("s", tensors)
    assert [(place.name, place.offset, place.num_bytes) for place in layout.places] == [
        ("a", 0, 65),
        ("b", 128, 12),
        ("c", 192, 0),
    ]
    assert layout.num_bytes == 192
    assert codec.layout_of_specs("s", layout.specs) == layout


def test_digest_is_fixed() -> None:
    """The digest is part of the stored format: a change of it makes every stored sample unreadable."""
    tensors = {
        "x": torch.arange(6, dtype=torch.int32).view(2, 3),
        "y": torch.tensor([1.5], dtype=torch.bfloat16),
    }
    assert digest_of("run0:s0", tensors) == "0ac5386912436b16ab9328df834ddd21"


def test_digest_covers_id_names_shapes_dtypes_and_bytes() -> None:
    """Equal bytes under another id, name, shape or dtype have another digest."""
    x = torch.arange(6, dtype=torch.int32)
    digests = [
        digest_of("a", {"x": x}),
        digest_of("b", {"x": x}),
        digest_of("a", {"y": x}),
        digest_of("a", {"x": x.view(2, 3)}),
        digest_of("a", {"x": x.view(torch.float32)}),
        digest_of("a", {"x": x + 1}),
        digest_of("a", {"x": x, "y": torch.empty(0)}),
    ]
    assert len(set(digests)) == len(digests)


def test_large_tensors_are_copied_whole_and_digested_as_small_ones() -> None:
    """Contiguous, strided and of odd size: in blocks, the bytes and the digest are those of one piece."""
    generator = torch.Generator().manual_seed(1)
    wide = torch.randint(0, 256, (1031, 2 * codec.BLOCK_BYTES // 1000), generator=generator).to(torch.uint8)
    tensors = {
        "contiguous": wide,
        "one_row": wide.view(1, -1),
        "strided": wide[:, 1::2],
        "transposed": wide.T,
        "typed": torch.randn(3 * codec.BLOCK_BYTES // 7, generator=generator).to(torch.bfloat16),
    }
    layout = codec.layout_of_tensors("s", tensors)
    description = codec.describe("s", layout)
    payload = torch.empty(layout.num_bytes, dtype=torch.uint8)
    digest = codec.write(layout, description, tensors, payload.numpy().data)
    pieces = [t.contiguous().view(torch.uint8).numpy().tobytes() for _, t in sorted(tensors.items())]
    assert digest == xxhash.xxh3_128_hexdigest(description + b"".join(pieces))
    got, again = codec.read(layout, description, payload.numpy().data)
    assert again == digest
    assert_same(got, tensors)
    assert all(tensor.data_ptr() % codec.ALIGNMENT_BYTES == 0 for tensor in got.values())


def test_digest_ignores_what_lies_between_tensors() -> None:
    """A recycled slot has old bytes in the gaps; they belong to no tensor."""
    tensors = {"a": torch.ones(1), "b": torch.ones(1)}
    layout = codec.layout_of_tensors("s", tensors)
    description = codec.describe("s", layout)
    clean, dirty = (torch.full((layout.num_bytes,), fill, dtype=torch.uint8) for fill in (0, 255))
    digests = {codec.write(layout, description, tensors, payload.numpy().data) for payload in (clean, dirty)}
    assert len(digests) == 1


def test_descriptions_come_back() -> None:
    """Id and specs survive, whatever characters the id has."""
    layout = codec.layout_of_tensors("s", {"x": torch.zeros(2, 0), "y": torch.tensor(True)})
    assert codec.undescribe(codec.describe('lauf:ä"\n☃', layout)) == ('lauf:ä"\n☃', layout)


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"\xff",
        b"[]",
        b"[1,[]]",
        b'["s",[["x","float32"]]]',
        b'["s",[["x","quaternion",[1]]]]',
        b'["s",[["x","float32",["1"]]]]',
        b'["s", [["x","float32",[1]]]]',
        b'["s",[["x","float32",[1]]],0]',
        b"[" * 4000,
    ],
)
def test_damaged_descriptions_are_refused(damaged: bytes) -> None:
    """Bytes that `describe` would not have written are no description."""
    with pytest.raises(ValueError, match="no description"):
        codec.undescribe(damaged)


def test_specs_name_every_supported_dtype() -> None:
    """A spec's dtype is the name torch gives it, so that other tools understand it."""
    for name, dtype in codec.DTYPES.items():
        layout = codec.layout_of_tensors("s", {"x": torch.zeros(2, dtype=dtype)})
        assert layout.specs == {"x": FeatureSpec("x", (2,), name)}
        assert str(dtype) == f"torch.{name}"
