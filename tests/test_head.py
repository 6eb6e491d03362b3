"""The heads: what a comparison of whole networks does not show."""

import copy
from datetime import timedelta

import pytest
import torch
import torch.multiprocessing as mp
from networks import randomise_batch_norm
from torch import distributed, nn

from fastdeeplab.head import ASPPPooling


def pooling() -> ASPPPooling:
    module = ASPPPooling(16, 8)
    randomise_batch_norm(module)
    return module


def test_fault_15_one_value_per_channel_uses_the_running_statistics() -> None:
    module, x = pooling().train(), torch.randn(1, 16, 5, 7)
    expected = copy.deepcopy(module).eval()(x)
    assert torch.equal(module(x), expected)
    assert module[2].num_batches_tracked == 0


def test_two_values_per_channel_use_the_batch() -> None:
    module, x = pooling().train(), torch.randn(2, 16, 5, 7)
    expected = nn.Sequential.forward(copy.deepcopy(module), x).expand(-1, -1, 5, 7)
    assert torch.equal(module(x), expected)
    assert module[2].num_batches_tracked == 1


def test_frozen_batch_norm_stays_frozen() -> None:
    module, x = pooling().train(), torch.randn(2, 16, 5, 7)
    module[2].eval()
    assert torch.equal(module(x), copy.deepcopy(module).eval()(x))


def test_the_rule_survives_the_conversion_to_sync_batch_norm() -> None:
    """SyncBatchNorm does not run on a CPU, so the rule is what can make this pass."""
    module, x = pooling().train(), torch.randn(1, 16, 5, 7)
    expected = copy.deepcopy(module).eval()(x)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    assert isinstance(synced[2], nn.SyncBatchNorm)
    assert torch.equal(synced(x), expected)


def _sync_batch_norm_is_asked(rank: int, address: str) -> None:
    patience = timedelta(minutes=5)
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=patience)
    module = nn.SyncBatchNorm.convert_sync_batchnorm(pooling()).train()
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on"):
        module(torch.randn(1, 16, 5, 7))
    distributed.barrier()  # the other one may still be connecting
    distributed.destroy_process_group()


def test_two_processes_with_one_picture_each_share_their_statistics(tmp_path: object) -> None:
    """Two values per channel in all: SyncBatchNorm takes them (its error on a CPU shows that it was asked)."""
    mp.spawn(_sync_batch_norm_is_asked, (f"file://{tmp_path}/store",), nprocs=2)
