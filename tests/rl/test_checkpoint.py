"""States that are whole or refused, the older one to fall back to, and checkpoints that appear at once."""

import os

import pytest
import torch
import torch.distributed.checkpoint as dcp

from qrm_fast.rl.checkpoint import load_state, newest_state, save_checkpoint, save_state, states
from qrm_fast.rl.models import load_policy
from qrm_fast.rl.tokenizers import load_tokenizer


def parts_at(step):
    return {"weights": [{"w": torch.arange(1000.0) + step}], "credit": {"scale": step / 3, "none": None}}


def save(folder, *steps):
    for step in steps:
        save_state(folder, {"step": step, "config": {"lr": 0.1}}, parts_at(step))


def newest_step(folder):
    path, about = newest_state(folder)
    state = load_state(path, parts_at(0))
    assert torch.equal(state["weights"][0]["w"], torch.arange(1000.0) + about["step"])
    assert state["credit"] == {"scale": about["step"] / 3, "none": None} and about["config"] == {"lr": 0.1}
    return about["step"]


def test_the_newest_two_are_kept_and_the_newest_is_loaded(tmp_path):
    save(tmp_path, 9, 10, 11)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state-00000010", "state-00000011"]
    assert newest_step(tmp_path) == 11


def test_a_state_of_something_else_is_refused(tmp_path):
    save(tmp_path, 1)
    path, _ = newest_state(tmp_path)
    for parts in ({"other": torch.ones(3)}, {"weights": [{"w": torch.ones(7)}]}):
        with pytest.raises(ValueError, match=r"state-00000001 must be a state of this run, got"):
            load_state(path, parts)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def data_of(folder):
    return folder / "__0_0.distcp"


DAMAGE = {
    "truncated": lambda folder: os.truncate(data_of(folder), 500),
    "empty": lambda folder: os.truncate(data_of(folder), 0),
    "one bit": lambda folder: flip(data_of(folder)),
    "garbage": lambda folder: data_of(folder).write_bytes(b"not a state" * 100),
    "a file lost": lambda folder: data_of(folder).unlink(),
    "no metadata": lambda folder: (folder / ".metadata").unlink(),
    "no checksums": lambda folder: (folder / "checksums.json").unlink(),
    "checksums cut off": lambda folder: os.truncate(folder / "checksums.json", 20),
    "checksums of nothing": lambda folder: (folder / "checksums.json").write_text("[1]"),
    "another step": lambda folder: flip(folder / "about.json"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_state_is_named_and_the_older_one_taken(tmp_path, name):
    save(tmp_path, 1, 2)
    newest, older = states(tmp_path)
    DAMAGE[name](newest)
    with pytest.warns(UserWarning, match=rf"{newest.name} is damaged: its files are not those of its checksums"):
        assert newest_step(tmp_path) == 1
    DAMAGE[name](older)
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(ValueError, match=f"must hold a whole state, got 2 damaged: {newest.name} is the newest"),
    ):
        newest_state(tmp_path)


def test_a_write_that_was_killed_is_no_state(tmp_path):
    """What a kill leaves is ignored when a run goes on, and gone after the next state."""
    save(tmp_path, 1)
    (tmp_path / "state.new").mkdir()
    data_of(tmp_path / "state.new").write_bytes(data_of(states(tmp_path)[0]).read_bytes()[:100])
    (tmp_path / "state.old").mkdir()
    assert newest_step(tmp_path) == 1 and len(states(tmp_path)) == 1
    save(tmp_path, 2, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state-00000002", "state-00000003"]


def test_no_state(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold a state to go on from, state-STEP, got none"):
        newest_state(tmp_path)


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    save(tmp_path, 1)
    written = torch.save

    def half(value, stream, *args):
        written(value, stream, *args)
        raise OSError("[Errno 28] No space left on device")

    monkeypatch.setattr(torch, "save", half)
    sentence = r"the state of step 2 could not be written to .*: \[Errno 28\] No space .*; kept: state-00000001"
    with pytest.raises(OSError, match=sentence):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["state-00000001"]
    assert newest_step(tmp_path) == 1
    monkeypatch.setattr(dcp, "save", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("unexpected pos 64 vs 0")))
    with pytest.raises(OSError, match=r"the state of step 2 could not be written to .*: unexpected pos 64 vs 0"):
        save(tmp_path, 2)
    assert newest_step(tmp_path) == 1


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nothing_that_is_not_finite_is_saved(tmp_path, poison):
    save(tmp_path, 1)
    with pytest.raises(FloatingPointError, match=r"step 2 is not saved: optimizer\.masters\.1 is not finite"):
        save_state(tmp_path, {"step": 2}, {"optimizer": {"masters": [torch.ones(2), torch.tensor([1.0, poison])]}})
    assert newest_step(tmp_path) == 1

    tokenizer = load_tokenizer("arithmetic")
    model = load_policy("scratch:demo", tokenizer)
    with torch.no_grad():
        model.model.norm.weight[0] = poison
    with pytest.raises(FloatingPointError, match=r"LlamaForCausalLM is not saved: model\.norm\.weight is not finite"):
        save_checkpoint(model, tokenizer, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    tokenizer = load_tokenizer("arithmetic")
    model = load_policy("scratch:demo", tokenizer)
    save_checkpoint(model, tokenizer, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(directory):
        raise OSError("No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", full)
    with torch.no_grad():
        model.model.norm.weight += 1
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(model, tokenizer, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
