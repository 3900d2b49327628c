"""What every test starts from."""

import pgrl  # noqa: F401, I001  # before numpy, whose threads it sets, as in every run

import torch

torch.set_num_threads(1)  # the tensors are small: more threads only wait for each other
