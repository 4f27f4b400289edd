"""Ladders as files: what is written is read; what is wrong is named."""

import json

import pytest

from adapters.ladder import LadderInfo, digest, read_ladder, write_ladder
from tocom import TOME, Ladder, ReductionError
from tocom.reduction import ToMe

SMALL = Ladder("small", ToMe(), ((0, 0, 0), (0, 2, 1), (1, 3, 2)), 16)


@pytest.mark.parametrize("ladder", [SMALL, TOME])
def test_what_is_written_is_read(ladder, tmp_path):
    path = write_ladder(LadderInfo.of(ladder, {"kl": [0.0, 0.1]}), tmp_path / "ladder.json")
    info = read_ladder(tmp_path)
    assert info.ladder() == ladder
    assert info.evidence == {"kl": [0.0, 0.1]}
    assert info == read_ladder(path)


def test_an_option_at_its_default_and_the_form_of_a_number_change_no_digest():
    one = [Ladder("x", ToMe(importance=value), SMALL.rungs, 16) for value in (1, 1.0)]
    assert digest(one[0]) == digest(one[1])
    assert digest(one[0]) != digest(SMALL)
    # As it was before the method had options.
    assert digest(TOME).startswith("ff6d7e833ab5582d")


def test_the_digest_is_of_what_it_does():
    other = Ladder("other", ToMe(), SMALL.rungs, SMALL.patches)
    assert digest(other) == digest(SMALL)
    assert digest(Ladder("small", ToMe(), SMALL.rungs[:2], 16)) != digest(SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rungs": [[0, 1, 0]]}, "rung 0 .* must be the stock model"),
        ({"rungs": []}, "needs a rung 0"),
        ({"rungs": [[0, 0], [1, 1, 1]]}, "must be for 2 blocks, rung 1 is for 3"),
        ({"rungs": [[0, 0], [1, -1]]}, "amounts must be whole numbers of 0 or more, got -1"),
        ({"rungs": [[0, 0], [1, 1.5]]}, r"is no ladder: rungs\.1\.1"),
        ({"method": {"name": "magic"}}, "there is no method 'magic'; there are tome"),
        ({"method": {"name": "tome", "options": {"x": 1}}}, "has no option 'x'"),
        (
            {"method": {"name": "dtem", "options": {"channels": 10**400}}},
            r"method\.options: .*'channels' must be nearer to 0 than 1,048,576, got 10000",
        ),
        ({"format_version": 2}, "is no ladder: format_version"),
        ({"more": 1}, "is no ladder: more"),
        ({"patches": 0}, "a count of patches"),
    ],
)
def test_what_is_wrong_is_named(change, message, tmp_path):
    said = json.loads(LadderInfo.of(SMALL).model_dump_json()) | change
    (tmp_path / "ladder.json").write_text(json.dumps(said))
    with pytest.raises(ReductionError, match=message):
        read_ladder(tmp_path)


def test_a_file_that_is_not_there_or_no_json_is_named(tmp_path):
    with pytest.raises(ReductionError, match="cannot read the ladder"):
        read_ladder(tmp_path / "none.json")
    (tmp_path / "ladder.json").write_text("{")
    with pytest.raises(ReductionError, match="is no ladder"):
        read_ladder(tmp_path)
