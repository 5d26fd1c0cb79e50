"""A config is strict, complete and comes back as it was written."""

import json

import pytest
import yaml

from fewstep.config import Config, differences, load, parse
from fewstep.networks import Full, Lora
from fewstep.objectives import objectives
from fewstep.objectives.dmd import DMD
from fewstep.plain import ALIASES, override
from fewstep.trainer import Settings


def tree(**parts):
    """A fresh, small, right config as plain data."""
    return {
        "teacher": {"path": "zoo:sprites-sd"},
        "objective": {"name": "dmd", "steps": 2},
        "data": {"prompts": "zoo:sprites"},
        **parts,
    }


def judged(**inner):
    """An objective that holds one."""
    return {"objective": {"name": "adversarial", "heads": "ladd", "inner": {"name": "dmd", **inner}}}


def refusal(found):
    with pytest.raises(ValueError) as error:
        parse(found)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    return str(error.value)


def test_what_is_left_out_has_a_default():
    config = parse(tree())
    assert config.train == Settings() and config.teacher.guidance is None
    assert config.objective == DMD(steps=2)
    assert config.student.kind() == config.critic.kind() == Lora(32)
    assert parse(tree(student={"weights": "full"})).student.kind() == Full()
    assert parse(tree(student={"rank": 4, "alpha": 8})).student.kind() == Lora(4, 8.0)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"teecher": {}}, "teecher: unknown option; did you mean teacher?"),
        ({"teacher": {"path": "x", "guidence": 2}}, "teacher.guidence: unknown option; did you mean guidance?"),
        ({"student": {"wieghts": "full"}}, "student.wieghts: unknown option; did you mean weights?"),
        ({"critic": {"ranks": 2}}, "critic.ranks: unknown option; did you mean rank?"),
        ({"data": {"prompt": "x"}}, "data.prompt: unknown option; did you mean prompts?"),
        ({"train": {"rouns": 2}}, "train.rouns: unknown option; did you mean rounds?"),
        ({"objective": {"name": "dmd", "critic_turnz": 2}}, "objective.critic_turnz: unknown option; did you mean critic_turns?"),
        ({"objective": {"name": "dmdd"}}, "objective.name: 'dmdd' is not known; did you mean dmd?"),
        (judged(critic_turnz=2), "objective.inner.critic_turnz: unknown option; did you mean critic_turns?"),
        (judged(name="dmdd"), "objective.inner.name: 'dmdd' is not known; did you mean dmd?"),
        ({"objective": {"name": "adversarial", "inner": "dmd"}}, "objective.inner needs a name, as in objective"),
        ({"objective": {"name": "adversarial", "weigth": 1}}, "objective.weigth: unknown option; did you mean weight?"),
        ({"zzz": 1}, "zzz: unknown option; known: teacher, "),
        ({1: 2}, "1: unknown option"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(wrong, said):
    assert refusal({**tree(), **wrong}).startswith(said)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"objective": {"steps": 4}}, "objective needs a name, as in objective"),
        ({"objective": "dmd"}, "objective needs a name"),
        ({"train": None}, "train must hold settings, not None"),
        ({"teacher": "zoo:sprites-sd"}, "teacher must hold settings"),
        ({"teacher": {}}, "teacher.path: "),
        ({"teacher": {"path": "x", "guidance": 0}}, "teacher.guidance: the scale must be above 0, not 0: 1 is no guidance"),
        ({"student": {"weights": "half"}}, "student.weights: "),
        ({"train": {"rounds": "many"}}, "train.rounds: "),
        ({"train": {"rounds": 0}}, "train: train.rounds must be at least 1"),
        ({"train": {"dtype": "float16"}}, "train.dtype: "),
        ({"objective": {"name": "dmd", "steps": "four"}}, "objective: steps: "),
        (judged(steps="four"), "objective: inner: steps: "),
        (judged(name="adversarial"), "objective: inner: it trains heads of its own"),
        ({"objective": {"name": "adversarial", "loss": "harsh"}}, "objective: loss: "),
        (
            {"objective": {"name": "consistency", "steps": 4, "segments": 3}, "data": {"images": "x"}},
            "objective: segments (3) must divide steps (4)",
        ),
    ],
)
def test_a_wrong_value_is_refused_at_its_place(wrong, said):
    assert refusal({**tree(), **wrong}).startswith(said)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("train.clip", [-1, 0, NAN, INF, "nan"]),
        ("train.lr", [-1e-4, 0, NAN, INF, "nan", "inf"]),
        ("train.critic_lr", [0, NAN]),
        ("train.heads_lr", [0, INF]),
        ("train.weight_decay", [-0.1, NAN, INF]),
        ("train.betas", [[0.9, 1.0], [-0.1, 0.9], [NAN, 0.9]]),
        ("train.ema", [1, -0.1, NAN]),
        ("train.warmup", [-1]),
        ("train.seed", [-1, 2**32]),
        ("student.alpha", [0, -1, NAN, INF]),
        ("student.rank", [0, -4]),
        ("critic.alpha", [0]),
        ("teacher.guidance", [NAN, INF, -INF, "nan", 0, -1.5]),
        ("objective.low", [NAN]),
        ("objective.floor", [INF]),
        ("data.aspect", [NAN, INF]),
    ],
)
def test_a_number_that_trains_nonsense_is_refused_where_the_config_is_read(key, values):
    part, name = key.split(".")
    for value in values:
        found = tree()
        found[part] = {**found.get(part, {}), name: value}
        assert name in refusal(found), value


def test_no_objective_takes_what_is_not_finite():
    images = {"student": {"weights": "full"}, "data": {"images": "zoo:sprites"}}
    for wrong in ("nan", [2.0, INF]):
        said = refusal(tree(objective={"name": "consistency", "guidance": wrong}, **images))
        assert "guidance" in said
    assert refusal(tree(**judged(high="inf"), data={"images": "zoo:sprites"})).startswith("objective")
    assert refusal(tree(objective={"name": "dmd", "floor": "inf"})) == "objective.floor must be a finite number, not inf"


@pytest.mark.parametrize(
    "key", ["train.rounds", "train.lr", "train.critic_lr", "student.rank", "teacher.guidance", "objective.steps", "data.pairs"]
)
def test_true_is_no_number(key):
    part, name = key.split(".")
    found = tree()
    found[part] = {**found.get(part, {}), name: True}
    assert refusal(found) == f"{key} wants numbers, not true or false"
    assert refusal(tree(train={"betas": [False, 0.9]})) == "train.betas wants numbers, not true or false"
    assert refusal(tree(**judged(critic_turns=True), data={"images": "zoo:sprites"})).startswith(
        "objective.inner.critic_turns wants"
    )
    parse(tree(train={"checkpointing": True}, student={"weights": "full", "network": {"use_linear_projection": True}}))


def test_no_segments_are_not_the_segments_that_are_left_away():
    images = {"data": {"images": "zoo:sprites"}}
    said = refusal(tree(objective={"name": "consistency", "segments": 0}, **images))
    assert said == "objective: segments must be at least 1, not 0"
    assert parse(tree(objective={"name": "consistency", "segments": None}, **images)).objective.segments is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("DMD", "'DMD' is not known; did you mean dmd?"),
        ("lcm", "'lcm' is called consistency, here"),
        ("Hyper-SD", "'Hyper-SD' is called tcd, with segments, here"),
        ("dmd2", "'dmd2' is called dmd, or adversarial around it, here"),
        ([1], r"[1] is not known"),
        (None, "None is not known"),
    ],
)
def test_an_objective_by_its_papers_name_is_told_ours(name, said):
    assert refusal(tree(objective={"name": name})).startswith(f"objective.name: {said}")


def test_every_alias_names_objectives_that_there_are():
    for words in ALIASES.values():
        assert words.split(",")[0] in objectives()


@pytest.mark.parametrize("data", [{}, {"prompts": "a.txt", "images": "b"}])
def test_there_is_exactly_one_source_of_data(data):
    assert "data needs exactly one of prompts and images" in refusal(tree(data=data))


def test_an_objective_that_needs_images_gets_them():
    assert "objective consistency needs images: add data.images" in refusal(tree(objective={"name": "consistency"}))
    parse(tree(objective={"name": "consistency"}, data={"images": "zoo:sprites"}))
    parse(tree(objective={"name": "consistency"}, data={"prompts": "zoo:sprites", "pairs": 8}))


def test_a_follower_has_the_weights_of_its_leader():
    following = tree(objective={"name": "dmd", "ida": 0.97})
    parse(following | {"student": {"rank": 8}, "critic": {"rank": 8}})
    said = refusal(following | {"student": {"rank": 8}, "critic": {"rank": 16}})
    assert "the critic follows the student, so both need the same weights" in said
    said = refusal(following | {"student": {"rank": 8, "phases": 2}, "critic": {"rank": 8}})
    assert "objective dmd, set like this, wants a student of one network, not of 2 experts: leave student.phases away" in said


@pytest.mark.parametrize(
    ("first", "then", "where"),
    [
        ({"name": "progressive", "steps": 8}, {"name": "progressive", "steps": 2}, "at those of 4 steps"),
        ({"name": "progressive", "steps": 4}, {"name": "consistency", "steps": 4}, "anywhere"),
        ({"name": "dmd", "steps": 4}, {"name": "consistency", "steps": 4}, "anywhere"),
        ({"name": "boot", "steps": 1}, {"name": "progressive", "steps": 1}, "at those of 2 steps"),
        (
            {"name": "adversarial_distance", "inner": {"name": "progressive", "steps": 8}, "conditional": False},
            {"name": "adversarial_distance", "inner": {"name": "progressive", "steps": 2}, "conditional": False},
            "at those of 4 steps",
        ),
    ],
)
def test_a_tutor_is_asked_only_where_it_was_trained(first, then, where):
    images, steps = {"images": "zoo:sprites"}, first.get("steps", 8)
    stages = [{"objective": first}, {"teacher": "previous", "objective": then}]
    said = refusal(tree(data=images, stages=stages))
    assert f"stages.2: teacher: the student of previous knows the times of its own {steps} steps alone" in said
    assert f"this objective would ask it {where}; leave it away, or halve its steps by progressive" in said


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"name": "progressive", "steps": 8}, {"name": "progressive", "steps": 4}),
        ({"name": "guidance"}, {"name": "progressive", "steps": 2, "guidance": [1.0, 8.0]}),
        ({"name": "progressive", "steps": 8}, {"name": "progressive", "steps": 2, "factor": 4}),
        ({"name": "progressive", "steps": 4}, {"name": "regression", "steps": 1}),
        ({"name": "tcd", "steps": 4}, {"name": "progressive", "steps": 1}),
    ],
)
def test_a_tutor_that_knows_the_times_may_teach(first, then):
    data = {"prompts": "zoo:sprites", "pairs": 8}
    stages = [{"objective": first}, {"teacher": "previous", "objective": then}]
    assert len(parse(tree(data=data, student={"weights": "full"}, stages=stages)).stages) == 2


@pytest.mark.parametrize("more", [{"guidance": [2.0, 6.0]}, {"average": 0.95}])
def test_what_only_one_network_can_have_is_refused_to_experts(more):
    images = {"data": {"images": "zoo:sprites"}, "objective": {"name": "consistency", **more}}
    parse(tree(**images, student={"weights": "full"}))
    said = refusal(tree(**images, student={"weights": "full", "phases": 2}))
    assert "objective consistency, set like this, wants a student of one network, not of 2 experts" in said


def test_pairs_are_for_prompts():
    assert "data.pairs are drawn by the teacher for data.prompts" in refusal(tree(data={"images": "zoo:sprites", "pairs": 8}))


@pytest.mark.parametrize("name", objectives())
def test_what_is_dumped_is_what_is_loaded(name, tmp_path):
    needs = objectives()[name]().needs
    needed = {"images" if needs.images else "prompts": "zoo:sprites", "pairs": 8 if needs.pairs else 0}
    full = {"weights": "full"}
    config = parse(tree(objective={"name": name}, student=full, data=needed, train={"betas": [0.5, 0.9], "lr": "1e-4"}))
    assert_comes_back(config, tmp_path)


def test_a_wrapped_objective_comes_back_with_what_it_holds(tmp_path):
    found = tree(**judged(steps=1, critic_turns=2), data={"images": "zoo:sprites"})
    found["objective"]["taps"] = ["mid_block", "down_blocks.0"]
    config = parse(found)
    assert config.objective.inner == DMD(steps=1, critic_turns=2) and config.objective.steps == 1
    assert config.objective.needs.heads.taps == ("mid_block", "down_blocks.0")
    assert_comes_back(config, tmp_path)
    assert differences(config, parse({**found, **judged(steps=2)}))[0] == "objective.inner.critic_turns"


def assert_comes_back(config, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(config.dump())
    assert load(file) == config and load(file).dump() == config.dump()
    written = yaml.safe_load(config.dump())
    assert written["train"].keys() == Settings.__dataclass_fields__.keys()  # every default is written out
    assert written.keys() == Config.model_fields.keys()
    json.dumps(config.model_dump(mode="json"))


def test_set_overrides_a_value_and_makes_a_section(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree()))
    config = load(file, ["train.rounds=7", "student.weights=full", "objective.low=0.1", "teacher.guidance=null", "train.lr=1e-3"])
    assert (config.train.rounds, config.student.weights, config.objective.low) == (7, "full", 0.1)
    assert config.teacher.guidance is None and config.train.lr == 1e-3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train.rounds", "--set wants KEY=VALUE"),
        ("teacher.path.x=1", "path holds a value, not further settings"),
        ("train.rouns=7", "train.rouns: unknown option; did you mean rounds?"),
        ("train.betas=[1", "the value is not YAML"),
    ],
)
def test_a_wrong_override_is_refused(tmp_path, text, said):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree()))
    with pytest.raises(ValueError) as error:
        load(file, [text])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_an_override_leaves_the_rest_alone():
    found = tree()
    override(found, "train.seed=3")
    assert found == {**tree(), "train": {"seed": 3}}


@pytest.mark.parametrize(
    ("content", "said"), [(None, "there is no config at"), (b"", "holds no settings"), (b"[1", "is not YAML")]
)
def test_a_file_that_is_no_config_is_refused(tmp_path, content, said):
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=said) as error:
        load(file)
    assert "\n" not in str(error.value)


def test_a_folder_with_a_config_is_told_to_name_that(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree()))
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    assert str(error.value) == f"{tmp_path} is a folder; name the config in it, {tmp_path / 'config.yaml'}"


def test_a_key_is_given_once(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(f"{yaml.safe_dump(tree())}train:\n  lr: 0.1\n  seed: 1\n  lr: 0.2\n")
    with pytest.raises(ValueError, match=r"config.yaml is not YAML: key 'lr' is given twice \(line \d+\); keep one"):
        load(file)
    file.write_text(f"{yaml.safe_dump(tree())}student: &all {{rank: 4, alpha: 2}}\ncritic: {{<<: *all, alpha: 8}}\n")
    assert (load(file).student.kind(), load(file).critic.kind()) == (Lora(4, 2.0), Lora(4, 8.0))


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"teacher: {path: a\xe9}"])
def test_a_config_that_is_not_utf8_is_refused(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match="is not YAML|holds no settings"):
        load(tmp_path / "config.yaml")


def test_differences_are_named_by_their_place():
    old, new = parse(tree()), parse(tree(train={"rounds": 5, "lr": 0.1}, objective={"name": "dmd", "steps": 4}))
    assert differences(old, new) == ["objective.steps", "train.lr", "train.rounds"]
    assert differences(old, new, free=("train.rounds", "objective.steps")) == ["train.lr"]
    assert differences(old, parse(tree())) == []
