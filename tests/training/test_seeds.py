from training.seeds import derive


def test_derived_seeds_differ_by_seed_purpose_and_position() -> None:
    seeds = {derive(s, purpose, p) for s in (0, 1) for purpose in ("a", "b") for p in range(50)}
    assert len(seeds) == 200
