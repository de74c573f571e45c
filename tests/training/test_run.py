"""A run in plain torch: any step can be its start, and any cut of a batch gives the same gradient."""

import numpy as np
import pytest
import torch
from torch import nn

from acsr_ray.artifacts import ArtifactError
from acsr_ray.training.checkpoint import (
    STATE,
    Checkpoint,
    Position,
    read_checkpoint,
    restore_checkpoint,
    save_checkpoint,
)
from acsr_ray.training.feed import Rows, batches, needed_units
from acsr_ray.training.loop import OptimizerConfig, Stepper
from acsr_ray.training.objectives import AdversarialTraining, CrossEntropy, InnerAttack, Trades
from acsr_ray.training.order import Order
from acsr_ray.training.run import train_steps

SIDE, CLASSES = 8, 3
ORDER = Order((8,) * 12, batch_size=16, lanes=4, window_rows=16, seed=1)
CPU = torch.device("cpu")


class Tiny:
    """A small network without batch statistics."""

    image_size = SIDE

    def __init__(self, objective="plain", **optimizer):
        self.kind = objective
        self.seed = 5
        self.optimizer = OptimizerConfig(
            **{"epochs": 2, "batch_size": 16, "peak_lr": 0.05, "crop_padding": 1, **optimizer}
        )

    def build(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(
                nn.Conv2d(3, 8, 3, stride=2),
                nn.GroupNorm(2, 8),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(72, CLASSES),
            )

    def network(self, model):
        return model

    def objective(self, model, network, units):
        attack = InnerAttack(kind="single_step", norm="linf", epsilon=8 / 255)
        return {
            "plain": lambda: CrossEntropy(network),
            "adversarial": lambda: AdversarialTraining(model, network, attack, self.seed),
            "trades": lambda: Trades(model, network, attack, self.seed, 6.0),
        }[self.kind]()


def unit_rows(unit: int) -> Rows:
    rng = np.random.default_rng(unit)
    labels = rng.integers(0, CLASSES, 8)
    pixels = rng.integers(0, 120, (8, SIDE, SIDE, 3))
    pixels[np.arange(8), :, :, labels] += 100
    return Rows(pixels.astype(np.uint8), labels, np.arange(8), 0)


def begin(training):
    model = training.build()
    stepper = Stepper(model, training.optimizer, sum(map(ORDER.steps, range(training.optimizer.epochs))))
    return stepper, training.objective(model, model, ())


def run(training, stepper, objective, start=(0, 0)):
    epoch, step = start
    events = [
        event
        for at in range(epoch, training.optimizer.epochs)
        for event in ORDER.events((0, 1, 2, 3), at, step if at == epoch else 0)
    ]
    fed = batches(ORDER, (0, 1, 2, 3), events, map(unit_rows, needed_units(events)))
    yield from train_steps(training, objective, stepper, fed, CPU)


def losses(training):
    return [loss.item() for _, loss in run(training, *begin(training))]


@pytest.mark.parametrize("objective", ["plain", "adversarial", "trades"])
def test_training_learns(objective):
    found = losses(Tiny(objective, epochs=8))
    assert np.mean(found[-6:]) < 0.6 * np.mean(found[:6])


@pytest.mark.parametrize("objective", ["plain", "adversarial", "trades"])
@pytest.mark.parametrize("stop", [1, 6, 11])
def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(objective, stop, tmp_path):
    training = Tiny(objective, ema_decay=0.9, schedule="cosine" if stop == 6 else "one_cycle")
    whole, parts = begin(training)
    expected = [loss.item() for _, loss in run(training, whole, parts)]
    first, parts = begin(training)
    for number, (batch, _) in enumerate(run(training, first, parts), start=1):
        at = batch.step
        if number == stop:
            over = at.index + 1 == ORDER.steps(at.epoch)
            position = Position(at.epoch + over, 0 if over else at.index + 1, number)
            save_checkpoint(tmp_path / "c", first, position, "me")
            break
    second, parts = begin(training)
    position = read_checkpoint(tmp_path / "c", "me").position
    restore_checkpoint(tmp_path / "c", second, position)
    rest = [loss.item() for _, loss in run(training, second, parts, (position.epoch, position.step))]
    assert rest == expected[stop:]
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name
    assert any(
        not torch.equal(tensor, whole.model.state_dict()[name]) for name, tensor in whole.weights().items()
    )


@pytest.mark.parametrize("objective", ["plain", "adversarial"])
def test_accumulated_parts_give_the_step_of_the_whole_batch(objective):
    whole, cut = losses(Tiny(objective)), losses(Tiny(objective, accumulate=4))
    assert cut == pytest.approx(whole, abs=2e-4)
    assert cut != whole


def test_half_precision_is_close_and_leaves_weights_in_float():
    training = Tiny(precision="bfloat16")
    stepper, parts = begin(training)
    found = [loss.item() for _, loss in run(training, stepper, parts)]
    exact = losses(Tiny())
    # Products in bfloat16 are summed in other ways on other processors.
    assert found == pytest.approx(exact, abs=0.1)
    assert found != exact
    assert {tensor.dtype for tensor in stepper.tensors().values()} == {torch.float32}


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine"])
def test_the_learning_rate_rises_to_its_peak_and_falls(schedule):
    training = Tiny(schedule=schedule, epochs=10)
    stepper, parts = begin(training)
    rates = []
    for _ in run(training, stepper, parts):
        rates.append(stepper.optimizer.param_groups[0]["lr"])
    # The rate behind the last step is never used.
    rates.pop()
    top = int(np.argmax(rates))
    assert max(rates) == pytest.approx(0.05, rel=0.02)
    steps = np.diff(rates)
    assert (steps[:top] > 0).all()
    assert (steps[top:] < 1e-9).all()
    assert rates[-1] < 0.001
    assert top / len(rates) < (0.4 if schedule == "one_cycle" else 0.1)


def saved(tmp_path):
    training = Tiny()
    stepper, _ = begin(training)
    save_checkpoint(tmp_path / "c", stepper, Position(1, 2, 8, (0.5,), 0.25), "me", {"accuracy": 0.5})
    return tmp_path / "c"


def test_a_checkpoint_tells_its_position(tmp_path):
    assert read_checkpoint(saved(tmp_path), "me") == Checkpoint(
        Position(1, 2, 8, (0.5,), 0.25), {"accuracy": 0.5}
    )


@pytest.mark.parametrize("damage", ["truncated", "flipped", "without state", "without manifest"])
def test_a_damaged_checkpoint_is_refused(damage, tmp_path):
    folder = saved(tmp_path)
    state = folder / STATE
    if damage == "truncated":
        state.write_bytes(state.read_bytes()[:-5])
    elif damage == "flipped":
        data = bytearray(state.read_bytes())
        data[-3] ^= 1
        state.write_bytes(data)
    elif damage == "without state":
        state.unlink()
    else:
        (folder / "manifest.json").unlink()
    with pytest.raises(ArtifactError):
        read_checkpoint(folder, "me")


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="other settings or data"):
        read_checkpoint(saved(tmp_path), "you")
