"""Loaders of users: what a second process may not be given."""

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from fastkd.compute.ranks import World
from fastkd.data.loaders.foreign import check_loader
from fastkd.errors import UserError

DATA = TensorDataset(torch.zeros(8, 3, 4, 4), torch.zeros(8, dtype=torch.int64))
ONE, TWO = (World(0, 0, size, torch.device("cpu"), None) for size in (1, 2))


@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_need_shares_of_their_own(shuffle):
    loader = DataLoader(DATA, batch_size=2, shuffle=shuffle)
    check_loader("train_loader", loader, ONE)
    with pytest.raises(UserError, match=r"each of the 2 processes all images.*DistributedSampler"):
        check_loader("train_loader", loader, TWO)
    shared = DataLoader(DATA, batch_size=2, sampler=DistributedSampler(DATA, 2, 0))
    check_loader("train_loader", shared, TWO)
