import io
import os
import pickle
import warnings
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from reptrt.core.errors import CheckpointError
from reptrt.sources.checkpoint import Checkpoint, load_weights, read_checkpoint


class CreatesFile:
    """Pickles as a call that creates a file when it is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.path),))


class Color(Enum):
    RED = "red"


class UserNet(nn.Module):
    """A model class, so that pickling a whole model names it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def read_state(path: Path) -> dict:
    """Return the only state dict of a file."""
    (state,) = read_checkpoint(path).states.values()
    return dict(state)


def loaded(path: Path, net: nn.Module | None = None) -> dict:
    """Return the state dict of a net (by default one with other weights) that took a file."""
    if net is None:
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    load_weights(net, read_checkpoint(path))
    return dict(net.state_dict())


def trained_net() -> nn.Module:
    """Return a small net whose buffers are not those of a new one."""
    net = small_net()
    nn.init.uniform_(net[1].running_mean)
    nn.init.uniform_(net[1].running_var, 1.0, 2.0)
    return net


def saved(path: Path, content: object, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def assert_same_tensors(got: dict, expected: dict) -> None:
    assert list(got) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0)


def refusal(path: Path) -> str:
    """Return the one line that a refused file gives."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
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
        got = read_state(path)
    assert not caught  # torch remarks on protocols other than 2
    assert type(got) is dict
    assert_same_tensors(got, dict(state))


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"], ids=["by-suffix", "by-content"])
def test_safetensors_are_read_whatever_their_suffix(tmp_path, name):
    state = small_net().state_dict()
    save_file(state, tmp_path / name)
    got = read_state(tmp_path / name)
    assert_same_tensors(dict(sorted(got.items())), dict(sorted(state.items())))


def test_torch_file_with_safetensors_suffix_is_read(tmp_path):
    state = small_net().state_dict()
    assert_same_tensors(read_state(saved(tmp_path / "a.safetensors", state)), dict(state))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"epoch": 3, "best": 0.5, "state_dict": state, "optimizer": {"lr": [0.1]}},
        lambda state: {"model": state},
        lambda state: {"ema": None, "model": {"state_dict": state}},
        lambda state: {"anything": {"else": state}, "scheduler": None},
        lambda state: {"ema": {"module": state}, "model": {"conv": torch.zeros(1)}},
        lambda state: {"model": prefixed(state, "module.")},
        lambda state: prefixed(state, "module._orig_mod."),
        lambda state: {"state_dict": prefixed(state, "model.backbone.")},
        lambda state: {"state_dict": prefixed(state, "a_trainer_nobody.knows.")},
        lambda state: {name: nn.Parameter(v, v.is_floating_point()) for name, v in state.items()},
        lambda state: {name: value.numpy() for name, value in state.items()},
        lambda state: {"generator": state, "discriminator": {"0.weight": torch.zeros(4, 3, 1, 1)}},
    ],
    ids=[
        *("state_dict", "model", "nested", "any-key", "ema", "module", "compiled", "lightning"),
        *("any-prefix", "parameters", "numpy", "other-net-beside"),
    ],
)
def test_wrappers_and_prefixes_are_removed(tmp_path, wrap):
    state = trained_net().state_dict()
    got = loaded(saved(tmp_path / "a.pt", wrap(state)))
    assert_same_tensors(got, dict(state))
    assert not any(value.requires_grad for value in got.values())


def prefixed(state: dict, prefix: str) -> dict:
    return {f"{prefix}{name}": value for name, value in state.items()}


def test_prefix_of_the_net_that_the_file_lacks_is_added(tmp_path):
    state = trained_net().state_dict()
    for given, names in (("", "body."), ("module.", "body."), ("module.", "body.net.")):
        net: nn.Module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        for key in reversed(names.rstrip(".").split(".")):
            net = nn.ModuleDict({key: net})
        got = loaded(saved(tmp_path / "a.pt", prefixed(state, given)), net)
        assert_same_tensors(got, prefixed(state, names))


def test_tensors_outside_the_prefix_are_left_out_and_named(tmp_path, caplog):
    state = trained_net().state_dict()
    content = prefixed(state, "model.") | {"loss.weight": torch.ones(2), "steps": torch.tensor(1)}
    path = saved(tmp_path / "a.pt", {"state_dict": content})
    assert_same_tensors(loaded(path), dict(state))
    assert caplog.messages == [
        f"{path}: 1 tensors outside state_dict.model are not in the net and are left out "
        "(loss.weight)"
    ]


def test_averaged_model_of_torch_is_unwrapped(tmp_path, caplog):
    net = trained_net()
    averaged = torch.optim.swa_utils.AveragedModel(net)
    path = saved(tmp_path / "a.pt", {"model_ema": averaged.state_dict()})
    assert_same_tensors(loaded(path), dict(net.state_dict()))
    assert not caplog.messages


@pytest.mark.parametrize(
    ("content", "taken", "others"),
    [
        (lambda a, b: {"model": b, "ema": a}, "ema", "model"),
        (lambda a, b: {"state_dict": b, "state_dict_ema": a}, "state_dict_ema", "state_dict"),
        (lambda a, b: {"model": b, "ema": {"shadow": a, "decay": 0.9}}, "ema.shadow", "model"),
        (
            lambda a, b: prefixed(b, "net.") | prefixed(a, "net_ema.module."),
            "net_ema.module",
            "net",
        ),
        (lambda a, b: {"best": b, "model": a}, "model", "best"),
        (lambda a, b: {"model": b, "state_dict": a}, "state_dict", "model"),
    ],
    ids=["ema", "state_dict_ema", "shadow", "flat", "known-key", "order"],
)
def test_averaged_weights_come_first_and_the_choice_is_said(
    tmp_path, caplog, content, taken, others
):
    averaged, raw = trained_net().state_dict(), small_net().state_dict()
    path = saved(tmp_path / "a.pt", content(averaged, raw))
    assert_same_tensors(loaded(path), dict(averaged))
    assert f"{path}: taking the weights in {taken}, not {others}" in caplog.messages


def test_averaged_parameters_are_laid_over_the_statistics_beside_them(tmp_path, caplog):
    net = trained_net()
    state = net.state_dict()
    shadow = {name: value.detach() + 1 for name, value in net.named_parameters()}
    content = {"state_dict": prefixed(state, "module."), "ema": prefixed(shadow, "module.")}
    path = saved(tmp_path / "a.pt", content)
    assert_same_tensors(loaded(path), {**state, **shadow})
    assert caplog.messages == [
        f"{path}: taking 4 averaged tensors from ema.module, the other 2 from state_dict.module"
    ]


def test_averaged_weights_without_names_are_not_taken_and_that_is_said(tmp_path, caplog):
    state = trained_net().state_dict()
    content = {"model": state, "ema": {"shadow_params": [torch.zeros(1)], "decay": 0.9}}
    path = saved(tmp_path / "a.pt", content)
    assert_same_tensors(loaded(path), dict(state))
    assert caplog.messages == [
        f"{path}: the averaged weights in ema do not fit the net; taking the weights in model"
    ]


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
def test_two_nets_that_fit_alike_are_refused(tmp_path, nested):
    state = trained_net().state_dict()
    content = (
        {"student": state, "teacher": state}
        if nested
        else prefixed(state, "student.") | prefixed(state, "teacher.")
    )
    path = saved(tmp_path / "a.pt", {"model": content})
    with pytest.raises(
        CheckpointError, match=r"in more than one place \(model.student, model.teacher\)"
    ):
        loaded(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_floating_weights_become_float32(tmp_path, dtype):
    state = trained_net().to(dtype).state_dict()
    got = loaded(saved(tmp_path / "a.pt", state))
    assert {value.dtype for value in got.values()} == {torch.float32, torch.int64}
    assert_same_tensors(got, {k: v.float() if v.ndim else v for k, v in state.items()})


@pytest.mark.parametrize(
    "extra",
    [
        np.float64(0.86),
        np.arange(3),
        defaultdict(list, {"loss": [0.5]}),
        Counter({"a": 2}),
        OrderedDict(a=1),
        Namespace(lr=0.1, path=Path("runs/exp")),
        PurePosixPath("runs/exp"),
        {1, 2},
        frozenset({"a"}),
        bytearray(b"raw"),
        1 + 2j,
        slice(1, 2),
        datetime(2024, 1, 2, tzinfo=timezone.utc),
        torch.device("cuda:0"),
        torch.float16,
        torch.Size([1, 2]),
        nn.functional.relu,
        nn.Conv2d,
        range(3),
        Color.RED,
        str.upper,
        "text".upper,
        torch.Generator().get_state(),
        {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1).state_dict()},
        torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("protocol", [2, 5], ids=["protocol2", "protocol5"])
def test_data_beside_the_weights_does_not_matter(tmp_path, extra, protocol):
    state = trained_net().state_dict()
    path = saved(tmp_path / "a.pt", {"state_dict": state, "x": extra}, pickle_protocol=protocol)
    assert_same_tensors(loaded(path), dict(state))


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
    assert "Bad CRC-32 for file 'a/data/0'" in refusal(path)


@pytest.mark.parametrize(
    "content",
    [b"hello world, not a checkpoint", b"\x08\x07\x12\x04onnx", pickle.dumps(torch.zeros)[:-1]],
    ids=["text", "onnx", "unfinished-pickle"],
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    assert "not a checkpoint, or a damaged one (" in refusal(tmp_path / "a.pt")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"], ids=str)
def test_plain_pickle_of_arrays_is_read(tmp_path, dtype, protocol):
    state, path = trained_net().state_dict(), tmp_path / "a.pkl"
    arrays = {name: value.numpy() for name, value in state.items()}
    arrays["0.weight"] = np.asfortranarray(arrays["0.weight"].astype(dtype))
    if protocol < 5:  # protocol 5 keeps arrays in buffers, which torch never writes
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody"}, protocol))
        torch.testing.assert_close(loaded(path), dict(state), rtol=1e-3, atol=1e-3)
    else:
        path.write_bytes(pickle.dumps(arrays, protocol))
        assert "numpy" in refusal(path)


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
    assert "asks for a call of posix.mkdir, which no checkpoint needs; it was not called" in message
    pickle.loads(pickle.dumps(content["hook"]))
    assert victim.exists()  # the trap works


def test_code_in_a_plain_pickle_is_not_run(tmp_path):
    victim, path = tmp_path / "created", tmp_path / "a.pkl"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps({"w": CreatesFile(victim)}, protocol))
        refusal(path)
        assert not victim.exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit itself
def test_torchscript_archive_is_refused_without_a_warning(tmp_path):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 2, 2)), buffer)
    (tmp_path / "a.pt").write_bytes(buffer.getvalue())
    assert "a TorchScript archive, not a state dict, open it" in refusal(tmp_path / "a.pt")


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
        ({1: torch.zeros(1)}, r"\(1: Tensor\)"),
        ({"state_dict": {"a": [1]}}, r"\('state_dict': dict\)"),
    ],
    ids=["tensor", "list", "empty", "no-tensor", "mixed", "number", "inner"],
)
def test_anything_but_a_state_dict_is_refused(tmp_path, content, message):
    path = saved(tmp_path / "a.pt", content)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)


def test_checkpoint_that_contains_itself_is_refused(tmp_path):
    content: dict[str, object] = {}
    content["model"] = content
    assert "('model': dict)" in refusal(saved(tmp_path / "a.pt", content))


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.zeros(3).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
        (torch.zeros(3, device="meta"), "torch._utils._rebuild_meta_tensor_no_storage"),
        (torch.zeros(3, dtype=torch.complex64).conj(), "torch._utils._rebuild_tensor_v2"),
    ],
    ids=["sparse", "meta", "conjugate"],
)
def test_tensors_that_are_not_dense_are_refused(tmp_path, tensor, kind):
    message = refusal(saved(tmp_path / "a.pt", {"conv.weight": tensor}))
    assert "1 of 1 entries are something else ('conv.weight': " in message
    assert kind in message


def test_complex_weights_are_refused(tmp_path):
    path = saved(tmp_path / "a.pt", {"weight": torch.zeros(2, 2, dtype=torch.complex64)})
    with pytest.raises(CheckpointError, match=r"got \(2, 2\) torch.complex64, expected \(2, 2\)"):
        loaded(path, nn.Linear(2, 2, bias=False))


def test_weights_that_are_not_finite_are_refused_with_names_and_count(tmp_path):
    state = {str(index): torch.ones(2) for index in range(9)}
    for index in range(1, 8):
        state[str(index)][1] = (torch.nan, torch.inf, -torch.inf)[index % 3]
    net = nn.ParameterList([torch.zeros(2)] * 9)
    with pytest.raises(CheckpointError, match="7 of 9 tensors hold NaN or Inf in float32 ") as err:
        loaded(saved(tmp_path / "a.pt", state), net)
    assert "(1, 2, 3, 4, 5, ...)" in str(err.value)


def test_weights_that_are_not_finite_do_not_matter_where_others_are_taken(tmp_path):
    state = trained_net().state_dict()
    raw = {name: value * torch.nan for name, value in state.items() if value.ndim}
    assert_same_tensors(loaded(saved(tmp_path / "a.pt", {"model": raw, "ema": state})), dict(state))


def test_float64_weight_beyond_float32_is_refused(tmp_path):
    state = {"0": torch.tensor([1e300], dtype=torch.float64)}
    with pytest.raises(CheckpointError, match=r"1 of 1 tensors hold NaN or Inf in float32 \(0\)"):
        loaded(saved(tmp_path / "a.pt", state), nn.ParameterList([torch.zeros(1)]))


@pytest.mark.parametrize("counters", [True, False], ids=["counters", "no-counters"])
def test_weights_are_copied_with_or_without_counters(counters):
    source, target = small_net(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    nn.init.uniform_(source[1].running_mean)
    state = {k: v for k, v in source.state_dict().items() if counters or "tracked" not in k}
    load_weights(target, Checkpoint(Path("a.pt"), {"": state}))
    assert all(map(torch.equal, target.state_dict().values(), source.state_dict().values()))


def message_of(net: nn.Module, state: dict) -> str:
    """Return the refusal of a state dict; the module must stay as it was."""
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(net, Checkpoint(Path("a.pt"), {"": state}))
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
        (
            nn.Sequential(nn.Conv2d(3, 4, 3)),
            small_net().state_dict(),
            "looks like a train-form checkpoint",
        ),
        (nn.Conv2d(3, 4, 3), {"a.w": torch.zeros(1), "b.w": torch.zeros(1)}, "no name agrees"),
    ],
    ids=["deploy", "train", "other"],
)
def test_hint_says_what_the_checkpoint_looks_like(net, state, hint):
    assert hint in message_of(net, dict(state))


def test_what_lies_outside_the_nearest_prefix_is_named(tmp_path):
    state = prefixed(small_net().state_dict(), "backbone.") | {"head.weight": torch.zeros(1)}
    del state["backbone.0.bias"]
    path = saved(tmp_path / "a.pt", {"state_dict": state})
    with pytest.raises(CheckpointError) as caught:
        loaded(path)
    assert str(caught.value).startswith(
        f"state_dict.backbone in {path}: does not fit the architecture: 1 missing (0.bias), "
        "1 outside state_dict.backbone (head.weight); "
    )
