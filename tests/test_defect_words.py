"""Words for defects that cannot be used: one sentence each."""

import pytest
import torch

from anomalib_clipad.components import Scores
from anomalib_clipad.errors import InputError
from anomalib_clipad.sdp import ClipAdSdpModel

from .conftest import make_clip

WORDS = ["scratch", "missing part", "dent"]


@pytest.mark.parametrize(
    ("defects", "sentence"),
    [
        ([], "defects needs at least two words to choose between, got none"),
        (["scratch"], "defects needs at least two words to choose between, got 'scratch' alone"),
        (["scratch", "dent", " Scratch"], "defects has 'scratch' twice"),
        (["scratch", ""], "every word must be text without {}, got ''"),
        (["scratch", 3], "every word must be text without {}, got 3"),
        (["a {} hole", "dent"], "every word must be text without {}, got 'a {} hole'"),
        ("scratch", "defects must be a list of words, such as [scratch, crack], or 'states', got 'scratch'"),
        (7, "defects must be a list of words"),
        ({}, "defects is an empty mapping"),
        (["scratch", "Unspecified"], "'unspecified' is what is said where no word is given; use another word"),
        ({"nut": ["dent"]}, "defects of 'nut' needs at least two words"),
        ({"bolt": WORDS}, "defects has words for bolt, but none for 'nut'; add it"),
        (["scratch", "very " * 80 + "deep dent"], "makes sentences that the text tower would cut"),
    ],
)
def test_words_that_cannot_be_used_are_named_in_a_sentence(defects: object, sentence: str) -> None:
    with pytest.raises(InputError) as raised:
        ClipAdSdpModel(clip=make_clip(), class_names=["nut"], defects=defects, rvs="mean")
    assert sentence in str(raised.value)
    assert len(str(raised.value)) < 200


def test_the_states_of_other_prompts_need_two_with_a_counterpart() -> None:
    medical = ClipAdSdpModel(clip=make_clip(), class_names=["brain"], defects="states", prompts="medical", rvs="mean")
    assert medical.defect_names.words == (("lesion", "tumor"),)
    prompts = {"normal_states": ["good {}", "{} without dent"], "anomalous_states": ["bad {}", "{} with dent"]}
    with pytest.raises(InputError, match="got only 'dent'"):
        ClipAdSdpModel(clip=make_clip(), class_names=["nut"], defects=True, prompts=prompts, rvs="mean")
    assert isinstance(medical.scores(torch.randn(1, 3, 32, 32)), Scores)
