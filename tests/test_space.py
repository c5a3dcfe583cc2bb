import contextlib
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from hwnas.errors import InputError
from hwnas.space import Architecture, Block, SearchSpace, Stage

NAMES = SearchSpace.names()


@pytest.fixture(params=NAMES, scope="module")
def space(request) -> SearchSpace:
    return SearchSpace.load(request.param)


def sampled(space: SearchSpace, count: int = 30) -> list[Architecture]:
    rng = np.random.default_rng(0)
    return [space.smallest(), space.largest(), *(space.sample(rng) for _ in range(count))]


def test_sizes_as_published():
    # facts: stage-wise BigNAS 5.0e9, per layer more than 10^12; AttentiveNAS 4.4e11
    assert SearchSpace.load("bignas", kernel_per="stage").size() == 5_013_504_000
    assert SearchSpace.load("bignas").size() > 1e12
    assert f"{SearchSpace.load('attentivenas').size():.1e}" == "4.4e+11"
    # Once-for-All: ((3 * 3)^2 + (3 * 3)^3 + (3 * 3)^4)^5 per resolution, "about 2 * 10^19"
    assert SearchSpace.load("ofa-mbv3").size() == 25 * (9**2 + 9**3 + 9**4) ** 5


def test_size_counts_what_the_walk_can_reach():
    space = SearchSpace.load(
        "tiny",
        resolution=[16, 24],
        stages=[{"width": [8, 16], "depth": [1, 3], "kernel": [3, 5], "expand": [2, 3]}],
        head={"width": 32},
        expand_per="layer",
    )
    rng = np.random.default_rng(0)
    reached = {space.sample(rng) for _ in range(20_000)}
    assert len(reached) == space.size() == 2 * 2 * 2 * (4**1 + 4**3)


def test_walk_asks_depth_before_blocks_and_only_for_what_exists(space):
    asked: list[str] = []

    def pick(name, choices):
        asked.append(name)
        return choices[0]

    arch = space.walk(pick)
    assert arch == space.smallest()
    assert len(asked) == len(set(asked))
    for number, stage in enumerate(arch.stages, 1):
        assert not any(name.startswith(f"stage{number}.block{len(stage.blocks) + 1}.") for name in asked)
        blocks = [i for i, name in enumerate(asked) if name.startswith(f"stage{number}.block")]
        assert all(i > asked.index(f"stage{number}.depth") for i in blocks)
    assert asked[0] == "resolution"
    assert asked[-1] == "head"


def test_walk_refuses_what_is_not_a_choice():
    space = SearchSpace.load("bignas")

    def pick(name, choices):
        return 9 if name == "stage3.block1.kernel" else choices[0]

    with pytest.raises(InputError, match=r"stage3\.block1\.kernel=9 is not one of \(3, 5\)"):
        space.walk(pick)


def test_architecture_round_trips(space):
    for arch in sampled(space):
        assert space.check(arch) is arch
        again = Architecture.from_dict(json.loads(json.dumps(arch.to_dict())))
        assert again == arch
        assert hash(again) == hash(arch)
        assert again.id == arch.id
    assert len({arch.id for arch in sampled(space)}) == len(set(sampled(space)))


def test_id_is_stable():
    arch = Architecture(24, 8, (Stage(8, (Block(3, 1),)),), 96)
    assert arch.id == "3ed923eb1406"


def test_genes_round_trip(space):
    archs = sampled(space)
    genes = space.encode(archs)
    assert genes.shape == (len(archs), len(space.genes))
    assert [space.decode(row) for row in genes] == archs
    drawn = space.sample_genes(200, np.random.default_rng(1))
    assert np.array_equal(space.encode([space.decode(row) for row in drawn]), drawn)


def test_sampled_genes_are_uniform():
    space = SearchSpace.load("bignas")
    genes = space.sample_genes(40_000, np.random.default_rng(0))
    for index, gene in enumerate(space.genes):
        present = genes[genes[:, index] >= 0, index]
        counts = np.bincount(present, minlength=len(gene.choices))
        expected = len(present) / len(gene.choices)
        assert np.all(abs(counts - expected) < 6 * math.sqrt(expected) + 1), gene.name


def test_mutation_changes_about_its_share_and_stays_inside(space):
    rng = np.random.default_rng(0)
    arch = space.largest()
    assert space.mutate(arch, rng, 0.0) == arch
    mutants = [space.mutate(arch, rng, 0.2) for _ in range(50)]
    assert all(space.check(mutant) == mutant for mutant in mutants)
    assert len(set(mutants)) > 40


def test_crossover_takes_every_choice_from_a_parent(space):
    rng = np.random.default_rng(0)
    a, b = space.sample(rng), space.sample(rng)
    for _ in range(20):
        child = space.check(space.crossover(a, b, rng))

        def come_from_a_parent(name, choices, child=child):
            values = []
            for parent in (a, b):
                with contextlib.suppress(InputError):
                    values.append(parent.get(name))
            assert child.get(name) in values, name
            return child.get(name)

        assert space.walk(come_from_a_parent) == child


def test_skeletons_are_network_wise_and_reach_both_ends(space):
    skeletons = list(space.skeletons())
    assert len(set(skeletons)) == len(skeletons)
    assert {space.smallest(), space.largest()} <= set(skeletons)
    for arch in skeletons:
        space.check(arch)
        for stage in arch.stages:
            assert len(set(stage.blocks)) == 1


def test_stage_wise_kernels():
    per_stage = SearchSpace.load("bignas", kernel_per="stage")
    per_layer = SearchSpace.load("bignas")
    rng = np.random.default_rng(0)
    for _ in range(20):
        arch = per_stage.sample(rng)
        assert all(len({block.kernel for block in stage.blocks}) == 1 for stage in arch.stages)
        per_layer.check(arch)
    mixed = next(
        arch
        for arch in (per_layer.sample(rng) for _ in range(100))
        if any(len({block.kernel for block in stage.blocks}) > 1 for stage in arch.stages)
    )
    with pytest.raises(InputError, match="kernel_per=stage"):
        per_stage.check(mixed)


def test_check_names_what_does_not_fit():
    space = SearchSpace.load("bignas")
    value = space.smallest().to_dict()
    value["stages"][2]["width"] = 41
    with pytest.raises(InputError, match=r"stage3\.width=41 is not one of \(40, 48\)"):
        space.check(Architecture.from_dict(value))
    value = space.smallest().to_dict()
    value["stages"].pop()
    with pytest.raises(InputError, match="only 6 stages"):
        space.check(Architecture.from_dict(value))
    value = space.smallest().to_dict()
    value["stages"] += value["stages"][-1:]
    with pytest.raises(InputError, match=r"8 stages"):
        space.check(Architecture.from_dict(value))


def test_children_at_other_resolutions_have_no_genes(space):
    child = space.smallest()
    between = replace(child, resolution=child.resolution + 1)
    assert space.check(between, any_resolution=True) == between
    assert space.has_resolution_of(child)
    assert not space.has_resolution_of(between)
    with pytest.raises(InputError, match=rf"resolution={between.resolution} is not one of"):
        space.encode([between])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": "big"}, "resolution: .*not 'big'"),
        ({"stem": None}, "stem"),
        ({"depth": 3}, "depth: is not a known key"),
    ],
)
def test_architecture_files_are_checked(change, message):
    value = SearchSpace.load("tiny").smallest().to_dict() | change
    with pytest.raises(InputError, match=message):
        Architecture.from_dict(value, source="arch.json")


def test_space_round_trips_through_plain_values(space):
    again = SearchSpace.from_dict(json.loads(json.dumps(space.to_dict())))
    assert again == space
    assert hash(again) == hash(space)


# ---------------------------------------------------------------- files

GOOD = """\
resolution: [24, 32]
stem: {width: 8}
stages:
  - {width: [8, 16], depth: [1, 2], kernel: 3, expand: 1}
  - width: {from: 16, to: 32, step: 8}
    depth: [1, 2]
    kernel: [3, 5]
    expand: [2, 3.5]
    stride: 2
head: {width: 64}
"""


def write(tmp_path, text: str, name: str = "mine.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_a_space_of_ones_own(tmp_path):
    space = SearchSpace.load(write(tmp_path, GOOD))
    assert space.name == "mine"
    assert space.stages[1].width == (16, 24, 32)
    assert space.largest().stages[1].blocks[0].expand == 3.5


def test_base_and_width_multiplier(tmp_path):
    space = SearchSpace.load(write(tmp_path, "base: bignas\nresolution: 160\nwidth_multiplier: 0.5\n"))
    assert space.resolution == (160,)
    assert space.name == "mine"
    assert space.stem.width == (16, 24)
    write(tmp_path, GOOD, "below.yaml")
    assert SearchSpace.load(write(tmp_path, "base: below.yaml\nactivation: relu\n")).activation == "relu"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("resolution: [24, 32]", "resolution: [32, 24]", r"mine\.yaml:1: .*resolution=\[32, 24\].*ascending"),
        ("resolution: [24, 32]", "resolution: []", r"mine\.yaml:1: .*resolution=\[\]"),
        ("resolution: [24, 32]", "resolution: [4]", r"resolution=4: resolutions are at least 8 pixels"),
        ("resolution: [24, 32]", "resolution: large", r"mine\.yaml:1: resolution: choices are .*not 'large'"),
        ("resolution: [24, 32]\n", "", r"mine\.yaml:1: resolution: is missing"),
        ("kernel: [3, 5]", "kernel: [3, 4]", r"mine\.yaml:5: stages\[1\]: kernel=4: kernels are odd"),
        ("kernel: [3, 5]", "kernel: [3, five]", r"mine\.yaml:7: stages\[1\]\.kernel: choices are numbers, not 'five'"),
        ("kernel: [3, 5]", "kernels: [3, 5]", r"mine\.yaml:7: stages\[1\]\.kernels: is not a known key"),
        ("kernel: [3, 5]", "kernel: [3, 3.5]", r"mine\.yaml:7: stages\[1\]\.kernel.*3\.5"),
        ("stride: 2", "stride: 3", r"mine\.yaml:5: stages\[1\]: stride=3: strides are 1 or 2"),
        ("stride: 2", "stride: two", r"mine\.yaml:9: stages\[1\]\.stride: .*not 'two'"),
        ("stride: 2", "stride: 2\n    stride: 1", r"mine\.yaml:10: stages\[1\]\.stride is written twice"),
        ("step: 8}", "step: 0}", r"mine\.yaml:5: stages\[1\]\.width: a range goes up by a positive step"),
        ("step: 8}", "steps: 8}", r"mine\.yaml:5: stages\[1\]\.width: a range has three whole numbers"),
        ("depth: [1, 2]\n", "depth: [0, 2]\n", r"stages\[1\]: depth=0: a stage has at least 1 block"),
        ("head: {width: 64}", "head: 64", r"mine\.yaml:10: head: .*not 64"),
        ("head: {width: 64}", "head: {width: true}", r"mine\.yaml:10: head\.width: choices are .*not True"),
        ("head: {width: 64}", "head: {width: 64", r"mine\.yaml:11: not YAML"),
        ("head: {width: 64}", "head: {width: 64}\nshortcut: none", r"mine\.yaml:11: shortcut: .*not 'none'"),
        ("head: {width: 64}", "head: {width: 64}\nbase: nothing", r"mine\.yaml:11: base: unknown space 'nothing'"),
        ("head: {width: 64}", "head: {width: 64}\nbase: mine.yaml", r"mine\.yaml:11: base: .*back to this file"),
        ("head: {width: 64}", "head: {width: 64}\nwidth_multiplier: -1", "width_multiplier=-1: must be"),
        ("head: {width: 64}", "head: {width: 64}\nactivation: gelu", r"mine\.yaml:11: activation: .*not 'gelu'"),
        ("stem: {width: 8}", "stem: !!python/object:os.system {}", r"mine\.yaml: not plain YAML"),
    ],
)
def test_every_mistake_in_a_file_is_named(tmp_path, old, new, message):
    assert old in GOOD
    with pytest.raises(InputError, match=message) as caught:
        SearchSpace.load(write(tmp_path, GOOD.replace(old, new)))
    assert "\n" not in str(caught.value)


def test_unknown_space_lists_the_known():
    with pytest.raises(InputError, match=r"unknown space 'bignass': not one of attentivenas, bignas, ofa-mbv3"):
        SearchSpace.load("bignass")
    with pytest.raises(InputError, match=r"nowhere\.yaml: cannot be read \(No such file"):
        SearchSpace.load("nowhere.yaml")
