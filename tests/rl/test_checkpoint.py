"""States that are whole or refused, the older one to fall back to, and checkpoints that appear at once."""

import os

import pytest
import torch

from qrm_fast.rl.checkpoint import load_state, save_checkpoint, save_state, states
from qrm_fast.rl.models import load_policy
from qrm_fast.rl.tokenizers import load_tokenizer


def save(folder, *steps):
    for step in steps:
        save_state(folder, step, {"step": step, "weights": {"w": torch.arange(1000.0) + step}})


def test_the_newest_two_are_kept_and_the_newest_is_loaded(tmp_path):
    save(tmp_path, 9, 10, 11)
    assert [path.name.split("-")[1] for path in states(tmp_path)] == ["00000011", "00000010"]
    state = load_state(tmp_path)
    assert state["step"] == 11 and torch.equal(state["weights"]["w"], torch.arange(1000.0) + 11)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": lambda path: os.truncate(path, 500),
    "empty": lambda path: os.truncate(path, 0),
    "one bit": flip,
    "garbage": lambda path: path.write_bytes(b"not a state" * 100),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_state_is_named_and_the_older_one_taken(tmp_path, name):
    save(tmp_path, 1, 2)
    newest, older = states(tmp_path)
    DAMAGE[name](newest)
    with pytest.warns(UserWarning, match=rf"{newest.name} is damaged: its checksum is not the one in its name"):
        assert load_state(tmp_path)["step"] == 1
    DAMAGE[name](older)
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(ValueError, match=f"must hold a whole state, got 2 damaged: {newest.name} is the newest"),
    ):
        load_state(tmp_path)


def test_a_write_that_was_killed_is_no_state(tmp_path):
    """What a kill leaves is ignored when a run goes on, and gone after the next state."""
    save_state(tmp_path, 1, {"x": torch.ones(3)})
    written = states(tmp_path)[0].read_bytes()
    for left in (b"", written[:100], written):
        (tmp_path / "state.new").write_bytes(left)
        assert load_state(tmp_path)["x"].tolist() == [1, 1, 1] and len(states(tmp_path)) == 1
    save_state(tmp_path, 2, {"x": torch.zeros(3)})
    assert load_state(tmp_path)["x"].tolist() == [0, 0, 0] and not (tmp_path / "state.new").exists()


def test_no_state(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold a state to go on from, state-STEP-CHECKSUM\.pt, got none"):
        load_state(tmp_path)


@pytest.mark.parametrize(
    "error", [OSError("[Errno 28] No space left on device"), RuntimeError("unexpected pos 64 vs 0")]
)
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, error):
    save(tmp_path, 1)

    def half(parts, path):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match=r"the state of step 2 could not be written to .*: .*; kept: state-00000001-"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == [states(tmp_path)[0].name]
    assert load_state(tmp_path)["step"] == 1


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nothing_that_is_not_finite_is_saved(tmp_path, poison):
    save(tmp_path, 1)
    with pytest.raises(FloatingPointError, match=r"step 2 is not saved: optimizer\.masters\.1 is not finite"):
        save_state(tmp_path, 2, {"optimizer": {"masters": [torch.ones(2), torch.tensor([1.0, poison])]}})
    assert load_state(tmp_path)["step"] == 1

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
