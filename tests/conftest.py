"""Settings of the whole suite."""

import torch

# Models here are tiny: threads would only spin, and wait for cores that other processes use.
torch.set_num_threads(1)
