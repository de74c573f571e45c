"""Train a small network with a heavy ballast on two workers: its checkpoints take a while to write."""

import json
import logging
import sys
from pathlib import Path

import torch
from torch import nn

from acsr_ray.distributed.runtime import RaySettings
from acsr_ray.distributed.trainer import run_training
from acsr_ray.training.loop import OptimizerConfig
from acsr_ray.training.objectives import CrossEntropy
from acsr_ray.training.settings import RunSettings
from acsr_ray.training.shards import plan_training

sys.path.insert(0, str(Path(__file__).parent))


class Heavy:
    """See `acsr_ray.training.run.Training`."""

    image_size = 16
    seed = 3
    optimizer = OptimizerConfig(
        epochs=2, batch_size=16, peak_lr=0.02, crop_padding=1, lanes=4, shuffle_rows=32
    )

    def __init__(self, megabytes):
        self.megabytes = megabytes

    def build(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [nn.Conv2d(3, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten()]
            model = nn.Sequential(*layers, nn.Linear(392, 3))
        ballast = torch.zeros(self.megabytes * 2**18)
        model.register_parameter("ballast", nn.Parameter(ballast, requires_grad=False))
        return model

    def network(self, model):
        return model

    def objective(self, model, network, units):
        return CrossEntropy(network)

    def closing_metrics(self, model, held_out, device):
        return {}

    def describe(self):
        return {}


if __name__ == "__main__":
    from train_heavy import Heavy as Shipped  # not of __main__, which workers cannot import

    shard, output, workers, megabytes = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    cpus = float(sys.argv[5])
    logging.basicConfig(level=logging.INFO)
    trained = run_training(
        Shipped(megabytes),
        plan_training([shard], 4),
        validation=(),
        output=output,
        device="cpu",
        run=RunSettings(workers=workers, threads=1, cpus_per_worker=cpus, checkpoint_steps=2, name="heavy"),
        settings=RaySettings(object_store_megabytes=100),
    )
    print(json.dumps(trained.metrics))
