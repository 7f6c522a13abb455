"""Which checkpoints are refused, and the learning-rate schedule and data order as functions of the step alone."""

import math

import pytest
import torch

from based_mp.data.sampler import GlobalBatchSampler
from based_mp.errors import UserError
from based_mp.parallel.state import Ranks
from based_mp.training import checkpoint as ckpt
from based_mp.training.health import check_loss
from based_mp.training.reshard import check_convertible
from based_mp.training.schedule import learning_rate
from tests.models import tiny_config

ONE = Ranks(0, 1, 0, 0, 1, 0, 1, torch.device("cpu"))
LAYOUT = {"tensor_parallel": 1, "data_parallel": 1, "zero_stage": 1}


def publish(root, config, **changes):
    """A checkpoint folder with one small file in place of DeepSpeed's shards."""
    folder, temporary = root / "step_00000005", root / ".writing"
    temporary.mkdir(parents=True)
    (temporary / "shard.pt").write_bytes(b"12345")
    ckpt.publish(temporary, folder, {"step": 5, "universal": False, "layout": LAYOUT,
                                     "architecture": ckpt.architecture(config.model)} | changes)
    return folder


def test_whole_checkpoint_is_taken(tmp_path):
    folder = publish(tmp_path, tiny_config())
    assert ckpt.newest(tmp_path) == ckpt.resolve(tmp_path) == folder
    ckpt.check_compatible(ckpt.read_meta(folder), folder, tiny_config(), ONE)


@pytest.mark.parametrize("damage, told", [
    (lambda f: (f / "shard.pt").write_bytes(b"123"), "damaged"),
    (lambda f: (f / "shard.pt").unlink(), "damaged"),
    (lambda f: (f / "meta.json").unlink(), "not a complete checkpoint"),
    (lambda f: (f / "meta.json").write_text("{"), "not a complete checkpoint"),
    (lambda f: (f / "meta.json").write_text("{}"), "not a complete checkpoint"),
    (lambda f: (f / "meta.json").write_text("[]"), "not a complete checkpoint")])
def test_half_written_is_refused(tmp_path, damage, told):
    folder = publish(tmp_path, tiny_config())
    damage(folder)
    with pytest.raises(UserError, match=told):
        ckpt.read_meta(folder)


def test_latest_without_its_folder(tmp_path):
    publish(tmp_path, tiny_config()).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="not there"):
        ckpt.newest(tmp_path)


def test_only_older_checkpoints_make_room(tmp_path):
    """What a run that was gone back from left behind is neither counted nor removed."""
    for step in (1, 2, 3, 9):
        (tmp_path / ckpt.step_name(step)).mkdir()
    (tmp_path / ".writing_step_00000002").mkdir()
    ckpt._prune(tmp_path / ckpt.step_name(3), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [ckpt.step_name(step) for step in (2, 3, 9)]


def test_folder_of_another_run_is_not_written_to(tmp_path):
    ckpt.check_unused(tmp_path / "nowhere")
    publish(tmp_path, tiny_config())
    with pytest.raises(UserError, match="holds checkpoints already"):
        ckpt.check_unused(tmp_path)


def test_other_architecture_and_layout(tmp_path):
    folder = publish(tmp_path, tiny_config(model={"num_layers": 5}))
    with pytest.raises(UserError, match="num_layers is 5 there and 4 here"):
        ckpt.check_compatible(ckpt.read_meta(folder), folder, tiny_config(), ONE)
    folder = publish(tmp_path / "b", tiny_config(), layout=LAYOUT | {"data_parallel": 2})
    with pytest.raises(UserError, match=r"launch/convert\.py reshard"):
        ckpt.check_compatible(ckpt.read_meta(folder), folder, tiny_config(), ONE)


def test_keys_newer_than_the_checkpoint(tmp_path):
    """Have their defaults there."""
    older = ckpt.architecture(tiny_config().model)
    del older["mixer_layers"], older["gla"], older["mamba"]["d_state"]
    folder = publish(tmp_path, tiny_config(), architecture=older)
    ckpt.check_compatible(ckpt.read_meta(folder), folder, tiny_config(), ONE)
    with pytest.raises(UserError, match="model.mixer_layers is {} there"):
        ckpt.check_compatible(ckpt.read_meta(folder), folder, tiny_config(model={"mixer_layers": {"gla": [3]}}), ONE)


@pytest.mark.parametrize("zero, universal", [(3, False), (0, False), (1, True)])
def test_reshard_refusals(tmp_path, zero, universal):
    with pytest.raises(UserError):
        check_convertible({"layout": LAYOUT | {"zero_stage": zero}, "universal": universal}, tmp_path)


def test_universal_needs_zero_1_or_2(tmp_path):
    folder = publish(tmp_path, tiny_config(), universal=True)
    with pytest.raises(UserError, match="zero_stage=1"):
        ckpt.check_compatible(ckpt.read_meta(folder), folder, tiny_config(parallel={"zero_stage": 3}), ONE)


def test_schedule():
    config = tiny_config(training={"steps": 100}, optimizer={"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 10})
    assert learning_rate(0, config) == pytest.approx(1e-6)
    assert learning_rate(5, config) == pytest.approx((1e-6 + 1e-3) / 2)
    assert learning_rate(10, config) == pytest.approx(1e-3)
    assert learning_rate(55, config) == pytest.approx((1e-3 + 1e-4) / 2)
    assert learning_rate(100, config) == learning_rate(500, config) == pytest.approx(1e-4)


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_data_order_does_not_depend_on_data_parallelism(dp):
    """Step 3 consumes samples 24 … 31 on any number of ranks, after a resume too."""
    seen = [sample for rank in range(dp) for micro in GlobalBatchSampler(
        first_step=3, last_step=4, global_batch_size=8, micro_batch_size=2, dp_rank=rank, dp_size=dp)
        for sample in micro]
    assert sorted(seen) == list(range(24, 32))


def test_loss_that_is_no_number():
    check_loss(1.0, 3, None)
    with pytest.raises(UserError, match="step 3"):
        check_loss(math.nan, 3, None)
