"""Rows of conditioning: cut, joined, emptied."""

import pytest
import torch

from pipeline.diffusion.conditioning import NO_LABEL, Conditioning, concatenate


def test_rows_and_joins_keep_every_field() -> None:
    told = Conditioning(torch.arange(4), torch.rand(4, 9))
    assert told.augmentation is not None
    parts = [told[:1], told[torch.tensor([1, 2])], told[3:]]
    joined = concatenate(parts).to("cpu")
    assert joined.label is not None
    assert joined.augmentation is not None
    assert torch.equal(joined.label, torch.arange(4))
    assert torch.equal(joined.augmentation, told.augmentation)
    assert concatenate([Conditioning(), Conditioning()]) == Conditioning()


def test_unconditional_rows_keep_what_describes_the_image() -> None:
    told = Conditioning(torch.arange(2), torch.rand(2, 9)).unconditional()
    assert told.label is not None
    assert told.label.tolist() == [NO_LABEL] * 2
    assert told.augmentation is not None
    assert Conditioning().unconditional() == Conditioning()


@pytest.mark.parametrize(
    ("one", "name"), [(Conditioning(torch.zeros(1)), "label"), (Conditioning(None, torch.zeros(1, 2)), "augmentation")]
)
def test_half_given_fields_do_not_join(one: Conditioning, name: str) -> None:
    with pytest.raises(ValueError, match=f"with and without {name}s"):
        concatenate([one, Conditioning()])
