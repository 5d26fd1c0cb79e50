import pytest
import torch
from tiny import save, tiny_sd_pipeline, tiny_zimage_pipeline

from fewstep.adapters import load_teacher
from fewstep.data import Pairs, fingerprint, open_source, pairs
from fewstep.denoiser import Guided
from fewstep.networks import Lora, build
from fewstep.sampling import sample
from fewstep.stream import stream

WORDS = ["a red circle", "a blue square", "a green star", "a cross", "a cyan thing"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    makers = {"sd": tiny_sd_pipeline, "zimage": tiny_zimage_pipeline}
    return {name: save(make(), tmp_path_factory.mktemp(name) / "pipe") for name, make in makers.items()}


@pytest.fixture
def teacher(folders):
    return load_teacher(str(folders["sd"]))


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(WORDS))
    return str(file)


@pytest.fixture(autouse=True)
def chunks_of_two(monkeypatch):
    monkeypatch.setattr(pairs, "CHUNK", 2)


@pytest.fixture
def drawn(monkeypatch):
    """Where each chunk that the teacher drew began."""
    starts, plain = [], pairs._draw

    def draw(teacher, wish, times, start, cond):
        starts.append(start)
        return plain(teacher, wish, times, start, cond)

    monkeypatch.setattr(pairs, "_draw", draw)
    return starts


def opened(teacher, prompts, cache=None, count=5, steps=2, scale=3.0, **options):
    wish = Pairs(Guided(teacher.denoiser(teacher.net), scale, teacher.null()), count, steps)
    return open_source(teacher, prompts=prompts, images_needed=False, pairs=wish, cache=cache, **options)


@pytest.mark.parametrize("family", ["sd", "zimage"])
def test_a_pair_is_noise_and_what_the_teacher_makes_of_it_for_its_prompt(folders, family, prompts):
    teacher = load_teacher(str(folders[family]))
    source = opened(teacher, prompts)
    assert sorted(source.prompts) == sorted(WORDS)
    guided = Guided(teacher.denoiser(teacher.net), 3.0, teacher.null())
    with torch.no_grad():
        again = sample(guided, source.noise, teacher.grid(2, "ddim"), teacher.encode(source.prompts), rng=stream(0, 0, 0, 0))
    torch.testing.assert_close(source.latents, again, rtol=1e-3, atol=1e-3)
    assert len(source) == len(source.cond) == len(source.noise) == 5


def test_noise_is_standard_and_never_twice_the_same(teacher, prompts):
    noise = opened(teacher, prompts, count=12, steps=1).noise
    assert noise.mean().abs() < 0.1
    assert noise.std() == pytest.approx(1, abs=0.1)
    assert len({row.sum().item() for row in noise}) == 12


def test_what_is_drawn_belongs_together(teacher, prompts):
    source = opened(teacher, prompts)
    cond, _, latents, noise = source.draw(20, stream(0, 0, 0, 0))
    for i in range(20):
        j = next(j for j in range(5) if torch.equal(source.latents[j], latents[i]))
        assert torch.equal(source.noise[j], noise[i])
        assert torch.equal(source.cond.tensors["prompt"][j], cond.tensors["prompt"][i])


def test_more_pairs_than_prompts_use_them_equally(teacher, prompts):
    source = opened(teacher, prompts, count=10, steps=1)
    assert sorted(source.prompts) == sorted(WORDS * 2)


def test_pairs_are_made_once_and_more_of_them_only_add(teacher, prompts, tmp_path, drawn):
    first = opened(teacher, prompts, tmp_path / "c", count=4)
    assert drawn == [0, 2]
    again = opened(teacher, prompts, tmp_path / "c", count=4)
    assert drawn == [0, 2]
    assert torch.equal(first.latents, again.latents) and torch.equal(first.noise, again.noise)
    more = opened(teacher, prompts, tmp_path / "c", count=5)
    assert drawn == [0, 2, 4]
    assert torch.equal(more.latents[:4], first.latents) and more.prompts[:4] == first.prompts


def test_an_interruption_loses_one_chunk(teacher, prompts, tmp_path, drawn, monkeypatch):
    plain = pairs._draw

    def tired(teacher, wish, times, start, cond):
        if start == 4:
            raise KeyboardInterrupt
        return plain(teacher, wish, times, start, cond)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pairs, "_draw", tired)
        opened(teacher, prompts, tmp_path / "c")
    assert drawn == [0, 2]
    opened(teacher, prompts, tmp_path / "c")
    assert drawn == [0, 2, 4]


@pytest.mark.parametrize("change", [{"scale": 2.0}, {"steps": 4}])
def test_another_way_of_drawing_is_drawn_anew(teacher, prompts, tmp_path, drawn, change):
    opened(teacher, prompts, tmp_path / "c")
    opened(teacher, prompts, tmp_path / "c", **change)
    assert drawn == [0, 2, 4] * 2


def test_another_network_is_another_teacher_and_adapters_on_it_are_not(teacher):
    from dataclasses import replace

    def known(seed, adapted=False):
        pipe = tiny_sd_pipeline(seed)
        if adapted:
            build(pipe.unet, {"student": Lora(2)}, lora_targets=teacher.family.lora_targets)
        return fingerprint(replace(teacher, path="owner/model", pipe=pipe), "unet")

    assert known(0) == known(0, adapted=True) != known(1)


def test_processes_that_share_a_cache_share_the_work(teacher, prompts, tmp_path, drawn, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    second = opened(teacher, prompts, tmp_path / "c")
    assert drawn == [2, 4, 0]  # begins where the first would come last
    monkeypatch.setenv("RANK", "0")
    first = opened(teacher, prompts, tmp_path / "c")
    assert drawn == [2, 4, 0]
    assert torch.equal(first.latents, second.latents)


def test_progress_is_shown(teacher, prompts, capsys):
    opened(teacher, prompts, steps=1, progress=True)
    assert "sampling the teacher: 5/5" in capsys.readouterr().err
