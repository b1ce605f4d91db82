import io
import logging
import os
import pickle
import warnings
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from reptrt.core.errors import CheckpointError
from reptrt.sources.checkpoint import load_state_dict, load_weights


class CreatesFile:
    """Pickles as a call that creates a file when it is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.path),))


class UserNet(nn.Module):
    """A model class, so that pickling a whole model names it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def saved(path: Path, content: object, **options: bool) -> Path:
    torch.save(content, path, **options)
    return path


def assert_same_tensors(got: dict, expected: dict) -> None:
    assert list(got) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0)


def refusal(path: Path) -> str:
    """Return the one line that a refused file gives."""
    with pytest.raises(CheckpointError) as caught:
        load_state_dict(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 500
    return message


@pytest.mark.parametrize("protocol", [2, 3], ids=["protocol2", "protocol3"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_state_dict_comes_back_as_it_was_saved(tmp_path, zipped, protocol):
    state, path = small_net().state_dict(), tmp_path / "a.pt"
    torch.save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = load_state_dict(path)
    assert not caught  # torch remarks on protocols other than 2
    assert type(got) is dict
    assert_same_tensors(got, dict(state))


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"], ids=["by-suffix", "by-content"])
def test_safetensors_are_read_whatever_their_suffix(tmp_path, name):
    state = small_net().state_dict()
    save_file(state, tmp_path / name)
    got = load_state_dict(tmp_path / name)
    assert_same_tensors(dict(sorted(got.items())), dict(sorted(state.items())))


def test_torch_file_with_safetensors_suffix_is_read(tmp_path):
    state = small_net().state_dict()
    assert_same_tensors(load_state_dict(saved(tmp_path / "a.safetensors", state)), dict(state))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"epoch": 3, "best": 0.5, "state_dict": state, "optimizer": {"lr": [0.1]}},
        lambda state: {"model": state},
        lambda state: {"ema": None, "model": {"state_dict": state}},
        lambda state: {"model_state": state, "scheduler": None},
        lambda state: {"ema": {"module": state}, "model": {"conv": torch.zeros(1)}},
        lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
        lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
        lambda state: {name: nn.Parameter(v, v.is_floating_point()) for name, v in state.items()},
    ],
    ids=["state_dict", "model", "nested", "model_state", "ema", "module", "compiled", "parameters"],
)
def test_wrappers_and_prefixes_are_removed(tmp_path, wrap):
    state = small_net().state_dict()
    got = load_state_dict(saved(tmp_path / "a.pt", wrap(state)))
    assert_same_tensors(got, dict(state))
    assert not any(value.requires_grad for value in got.values())


def test_averaged_model_of_torch_is_unwrapped(tmp_path):
    net = small_net()
    averaged = torch.optim.swa_utils.AveragedModel(net)
    path = saved(tmp_path / "a.pt", {"model_ema": averaged.state_dict()})
    assert_same_tensors(load_state_dict(path), dict(net.state_dict()))


def test_averaged_weights_come_first_and_the_choice_is_said(tmp_path, caplog):
    content = {"model": {"w": torch.zeros(2)}, "ema": {"w": torch.ones(2)}}
    path = saved(tmp_path / "a.pt", content)
    with caplog.at_level(logging.WARNING):
        assert load_state_dict(path)["w"].tolist() == [1.0, 1.0]
    assert caplog.messages == [f"{path}: taking the weights in ema, not model"]


def test_prefix_of_only_some_names_is_kept(tmp_path):
    state = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    assert list(load_state_dict(saved(tmp_path / "a.pt", state))) == ["module.a", "b"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_floating_weights_become_float32_and_counters_stay(tmp_path, dtype):
    state = {"w": torch.tensor([0.5, -3.0], dtype=dtype), "n": torch.tensor(7)}
    got = load_state_dict(saved(tmp_path / "a.pt", state))
    assert got["w"].dtype is torch.float32
    assert got["w"].tolist() == [0.5, -3.0]
    assert got["n"].dtype is torch.int64


def test_missing_folder_and_empty_files_are_refused(tmp_path):
    assert "does not exist; check the path" in refusal(tmp_path / "none.pt")
    assert "cannot be read (Is a directory)" in refusal(tmp_path)
    (tmp_path / "empty.pt").touch()
    assert "the file is empty" in refusal(tmp_path / "empty.pt")


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"], ids=str)
def test_truncated_files_are_refused(tmp_path, form):
    state, path = small_net().state_dict(), tmp_path / "a.pt"
    if form == "safetensors":
        save_file(state, path)
    else:
        saved(path, state, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    for length in (1, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "not a checkpoint, or a damaged one (" in refusal(path)


def test_changed_weight_bytes_are_noticed(tmp_path):
    path = saved(tmp_path / "a.pt", {"w": torch.full((64,), 1.5)})
    content = path.read_bytes()
    at = content.index(torch.full((64,), 1.5).numpy().tobytes())
    path.write_bytes(content[:at] + b"\x01" + content[at + 1 :])
    assert "the checksum of a/data/0 does not agree" in refusal(path)


@pytest.mark.parametrize(
    "content",
    [b"hello world, not a checkpoint", b"\x08\x07\x12\x04onnx", pickle.dumps({"w": [1.0]}, 4)],
    ids=["text", "onnx", "plain-pickle"],
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    assert "not a checkpoint, or a damaged one (" in refusal(tmp_path / "a.pt")


def test_other_zip_files_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "no weights here")
    assert "not a checkpoint" in refusal(tmp_path / "a.zip")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_checkpoint_is_not_run(tmp_path, zipped):
    victim = tmp_path / "created"
    content = {"state_dict": small_net().state_dict(), "hook": CreatesFile(victim)}
    path = saved(tmp_path / "a.pt", content, _use_new_zipfile_serialization=zipped)
    message = refusal(path)
    assert not victim.exists()
    assert "holds more than tensors: posix.mkdir, not loaded because that would run code" in message
    pickle.loads(pickle.dumps(content["hook"]))
    assert victim.exists()  # the trap works


def test_code_in_a_plain_pickle_is_not_run(tmp_path):
    victim, path = tmp_path / "created", tmp_path / "a.pkl"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps({"w": CreatesFile(victim)}, protocol))
        refusal(path)
        assert not victim.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_whole_pickled_model_is_refused_with_the_remedy(tmp_path, zipped):
    path = saved(tmp_path / "a.pt", {"model": UserNet()}, _use_new_zipfile_serialization=zipped)
    message = refusal(path)
    assert "holds a whole pickled model (tests.sources.test_checkpoint.UserNet)" in message
    assert "torch.save(model.state_dict(), 'weights.pt')" in message


def test_pickled_options_beside_the_weights_are_refused_by_name(tmp_path):
    content = {"state_dict": small_net().state_dict(), "args": Namespace(lr=0.1)}
    message = refusal(saved(tmp_path / "a.pt", content))
    assert "holds more than tensors: argparse.Namespace" in message


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit itself
def test_torchscript_archive_is_refused_without_a_warning(tmp_path):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 2, 2)), buffer)
    (tmp_path / "a.pt").write_bytes(buffer.getvalue())
    assert "a TorchScript archive, not a state dict; open it" in refusal(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), r"holds a Tensor, expected a state dict"),
        ([torch.zeros(3)], r"holds a list, expected a state dict"),
        ({}, r"the state dict is empty"),
        ({"epoch": 3}, r"1 of 1 entries are something else \('epoch': int\)"),
        (
            {"w": torch.zeros(1), "epoch": 3, "lr": 0.1},
            r"expected only tensors, but 2 of 3 .* \('epoch': int, 'lr': float\)",
        ),
        ({"w": {"x": torch.zeros(1)}}, r"\('w': dict\)"),
        ({1: torch.zeros(1)}, r"\(1: Tensor\)"),
        ({"state_dict": {"a": [1]}}, r"\('state_dict': dict\)"),
    ],
    ids=["tensor", "list", "empty", "no-tensor", "mixed", "unknown-wrapper", "number", "inner"],
)
def test_anything_but_a_state_dict_is_refused(tmp_path, content, message):
    path = saved(tmp_path / "a.pt", content)
    with pytest.raises(CheckpointError, match=message):
        load_state_dict(path)


def test_checkpoint_that_contains_itself_is_refused(tmp_path):
    content: dict[str, object] = {}
    content["model"] = content
    assert "('model': dict)" in refusal(saved(tmp_path / "a.pt", content))


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.zeros(3).to_sparse(), "torch.sparse_coo"),
        (torch.zeros(3, dtype=torch.complex64), "torch.complex64"),
        (torch.zeros(3, device="meta"), "on meta"),
    ],
    ids=["sparse", "complex", "meta"],
)
def test_tensors_of_another_kind_are_refused(tmp_path, tensor, kind):
    message = refusal(saved(tmp_path / "a.pt", {"conv.weight": tensor}))
    assert "conv.weight is a tensor of kind" in message
    assert kind in message


def test_weights_that_are_not_finite_are_refused_with_names_and_count(tmp_path):
    state = {f"w{i}": torch.ones(2) for i in range(9)}
    for i in range(1, 8):
        state[f"w{i}"][1] = (torch.nan, torch.inf, -torch.inf)[i % 3]
    message = refusal(saved(tmp_path / "a.pt", state))
    assert "7 of 9 tensors hold NaN or Inf in float32 (w1, w2, w3, w4, w5, ...)" in message


def test_float64_weight_beyond_float32_is_refused(tmp_path):
    state = {"w": torch.tensor([1e300], dtype=torch.float64)}
    assert "1 of 1 tensors hold NaN or Inf in float32 (w)" in refusal(
        saved(tmp_path / "a.pt", state)
    )


@pytest.mark.parametrize("counters", [True, False], ids=["counters", "no-counters"])
def test_weights_are_copied_with_or_without_counters(counters):
    source, target = small_net(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    nn.init.uniform_(source[1].running_mean)
    state = {k: v for k, v in source.state_dict().items() if counters or "tracked" not in k}
    load_weights(target, state, "a.pt")
    assert all(map(torch.equal, target.state_dict().values(), source.state_dict().values()))


def message_of(net: nn.Module, state: dict) -> str:
    """Return the refusal of a state dict; the module must stay as it was."""
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(net, state, "a.pt")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    message = str(caught.value)
    assert message.startswith("a.pt: does not fit the architecture: ")
    assert "\n" not in message
    return message


def test_missing_and_unexpected_names_are_counted_and_the_first_five_shown():
    state = dict(small_net().state_dict())
    del state["0.bias"]
    state |= {f"extra{i}": torch.zeros(1) for i in range(7)}
    message = message_of(small_net(), state)
    assert (
        "1 missing (0.bias), 7 unexpected (extra0, extra1, extra2, extra3, extra4, ...);" in message
    )
    assert "check the architecture and its options" in message


def test_shapes_are_shown_as_got_and_expected():
    state = dict(small_net().state_dict())
    state["0.weight"] = torch.zeros(8, 3, 3, 3)
    state["0.bias"] = torch.zeros(4, dtype=torch.int8)
    message = message_of(small_net(), state)
    assert (
        "2 of another shape or kind (0.weight: got (8, 3, 3, 3), expected (4, 3, 3, 3), " in message
    )
    assert "0.bias: got (4,) torch.int8, expected (4,))" in message


@pytest.mark.parametrize(
    ("net", "state", "hint"),
    [
        (small_net(), {"0.weight": torch.zeros(4, 3, 3, 3)}, "looks like a deploy-form (fused)"),
        (nn.Conv2d(3, 4, 3), small_net().state_dict(), "looks like a train-form checkpoint"),
        (
            small_net(),
            {f"backbone.{k}": v for k, v in small_net().state_dict().items()},
            "every name starts with 'backbone.'",
        ),
        (nn.Conv2d(3, 4, 3), {"a.w": torch.zeros(1), "b.w": torch.zeros(1)}, "no name agrees"),
    ],
    ids=["deploy", "train", "prefix", "other"],
)
def test_hint_says_what_the_checkpoint_looks_like(net, state, hint):
    assert hint in message_of(net, dict(state))
