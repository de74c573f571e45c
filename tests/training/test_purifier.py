"""Training of the unrolled reconstruction on digits: it learns, its constraint bites, any step is a start."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from acsr_ray.attacks.pgd import attack_pixels
from acsr_ray.attacks.threat import ThreatModel
from acsr_ray.corpus.labelled import LabelledImages
from acsr_ray.purification.bundle import AutoStrength, load_bundle, save_bundle
from acsr_ray.purification.purifier import Purifier
from acsr_ray.sparse.noise import noise_level
from acsr_ray.sparse.tikhonov import tikhonov_split
from acsr_ray.sparse.unrolled import UnrolledConfig, spread_atoms
from acsr_ray.training.checkpoint import Position, read_checkpoint, restore_checkpoint, save_checkpoint
from acsr_ray.training.feed import Rows, batches, needed_units
from acsr_ray.training.loop import AdamConfig, Stepper, accuracy, predict
from acsr_ray.training.order import Order
from acsr_ray.training.pairs import PairConfig, Recipe, attack_pairs, draw_pairs
from acsr_ray.training.purifier import (
    BEYOND,
    BY_RESPONSE,
    MULTIPLIER_RANGE,
    NOISE,
    RESPONSE,
    TELLING,
    USUAL,
    ConstrainedPurifier,
    LossConfig,
    PurifierTraining,
    SurrogateConfig,
    starting_atoms,
)
from acsr_ray.training.run import train_steps

ORDER = Order((10,) * 12, batch_size=24, lanes=4, window_rows=20, seed=1)
CPU = torch.device("cpu")
SHARINGS = ("global", "thresholds", "filters")


@pytest.fixture(scope="module")
def make(digits, tiny_bundle, tmp_path_factory):
    """Return settings of a training on digits, whose surrogate is the network that knows them."""
    script = tmp_path_factory.mktemp("surrogate") / "digits.pt"
    torch.jit.script(digits.model).save(str(script))

    def call(*, sharing="global", network=None, optimizer=None, bundle=tiny_bundle, **changes):
        shape = {"iterations": 2, "stride": 3, "deeper": (6,), "sharing": sharing, **(network or {})}
        steps = {"epochs": 2, "batch_size": 24, "crop_padding": 0, "flip": False, "peak_lr": 0.01}
        values = {
            "bundle": str(bundle),
            "bundle_digest": "b",
            "surrogates": (SurrogateConfig(location=str(script), digest="s"),),
            "image_size": 16,
            "network_config": UnrolledConfig(**shape),
            # All that a cluster has where filters are its own.
            "atoms": 8 if sharing == "filters" else 12,
            "init": "dictionary",
            "init_digest": None,
            "pairs": PairConfig(relative_l2=0.15, linf=16 / 255),
            "loss": LossConfig(),
            "optimizer": AdamConfig(**{**steps, **(optimizer or {})}),
            "seed": 5,
            **changes,
        }
        return PurifierTraining(**values)

    return call


@pytest.fixture(scope="module")
def unit_rows(digits):
    """Return a function from the number of a unit to its ten digits."""
    pixels = (digits.images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    labels = digits.labels.numpy()
    return lambda unit: Rows(
        pixels[10 * unit : 10 * unit + 10], labels[10 * unit : 10 * unit + 10], np.arange(10), 0
    )


@pytest.fixture(scope="module")
def held_out(digits):
    pixels = (digits.images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    rows = np.arange(len(pixels))
    return LabelledImages(pixels, digits.labels.numpy(), ("a",), np.zeros_like(rows), rows, (), 0)


def begin(training):
    model = training.build()
    stepper = Stepper(model, training.optimizer, sum(map(ORDER.steps, range(training.optimizer.epochs))))
    return stepper, training.objective(model, model, ())


def run(training, stepper, objective, unit_rows, start=(0, 0)):
    epoch, step = start
    events = [
        event
        for at in range(epoch, training.optimizer.epochs)
        for event in ORDER.events((0, 1, 2, 3), at, step if at == epoch else 0)
    ]
    fed = batches(ORDER, (0, 1, 2, 3), events, map(unit_rows, needed_units(events)))
    yield from train_steps(training, objective, stepper, fed, CPU)


def losses(training, unit_rows):
    return [loss.item() for _, loss in run(training, *begin(training), unit_rows)]


def rows_of(digits, count=24):
    """Return the columns of a loss for the first digits: images, labels and what was drawn for them."""
    images, labels = digits.head(count)
    generator = torch.Generator().manual_seed(1)
    share = torch.rand(count, generator=generator)
    share[::4] = 0
    noise = torch.randn(images.shape, generator=generator)
    recipe = Recipe(0, 2, False, 3).tensor(count)
    return images, labels, recipe, share, noise


@pytest.mark.parametrize("clean", [0.2, 0.02])
@pytest.mark.parametrize("sharing", SHARINGS)
def test_the_loss_is_a_mean_over_rows(make, digits, sharing, clean):
    training = make(sharing=sharing, pairs=PairConfig(relative_l2=0.15, clean=clean))
    model = training.build()
    objective = training.objective(model, model, ())
    columns = rows_of(digits)
    whole = objective.loss(*columns)
    (gradient,) = torch.autograd.grad(whole, model.dual)
    for count in (2, 4, 24):
        parts = [objective.loss(*part) for part in zip(*(c.chunk(count) for c in columns), strict=True)]
        assert torch.stack(parts).mean().item() == pytest.approx(whole.item(), rel=1e-3)
        (mean,) = torch.autograd.grad(torch.stack(parts).mean(), model.dual)
        assert mean.item() == pytest.approx(gradient.item(), rel=1e-3, abs=1e-6)
    # The parts differ, so their mean says something.
    assert max(part.item() for part in parts) > 1.2 * min(part.item() for part in parts)


def test_the_loss_is_the_formula(make, digits):
    training = make(loss=LossConfig(pixel=3.0, consistency=0.7, clean_drop=0.1))
    model = training.build()
    with torch.no_grad():
        model.dual.fill_(0.3)
    objective = training.objective(model, model, ())
    images, labels, recipes, share, noise = columns = rows_of(digits)
    found = objective.loss(*columns)
    surrogate = digits.model
    recipe = Recipe.from_tensor(recipes)
    attacked = attack_pairs(surrogate, images, labels, recipe, share, noise, training.pairs)
    with torch.no_grad():
        purified = model.reconstruction(
            *tikhonov_split(attacked, load_bundle(training.bundle).config.tikhonov)
        )
        wanted, got = surrogate(images).softmax(1), surrogate(purified).softmax(1)
    total = 0.0
    for row in range(24):
        divergence = (wanted[row] * (wanted[row] / got[row]).log()).sum().item()
        total += 3.0 * (purified[row] - images[row]).abs().mean().item() + 0.7 * divergence
        if share[row] == 0:
            lost = (wanted[row].argmax() == labels[row]).int() - (got[row].argmax() == labels[row]).int()
            # Clean rows stand for a fifth of all rows, as the settings have it.
            weight = model.multiplier().item() / 0.2
            total += weight * divergence - weight * (lost.item() - 0.1)
    assert found.item() == pytest.approx(total / 24, rel=1e-4)


def test_the_multiplier_stays_in_its_range(make):
    model = make().build()
    low, high = MULTIPLIER_RANGE
    assert model.multiplier().item() == pytest.approx((low * high) ** 0.5)
    values = []
    for dual in (-50.0, -1.0, 0.0, 1.0, 50.0):
        with torch.no_grad():
            model.dual.fill_(dual)
        values.append(model.multiplier().item())
    assert values == sorted(values)
    assert values[0] == pytest.approx(low)
    assert values[-1] == pytest.approx(high)


@pytest.mark.parametrize(("clean_drop", "rises"), [(0.005, True), (1.0, False)])
def test_the_multiplier_rises_when_clean_images_lose_more_than_they_may(make, digits, clean_drop, rises):
    training = make(loss=LossConfig(clean_drop=clean_drop))
    model = training.build()
    objective = training.objective(model, model, ())
    images, labels, recipes, share, noise = rows_of(digits)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Codes from the first threshold on, at twenty times their length and upside down: noise.
            if "thresholds" in name:
                parameter.zero_()
            elif "synthesis.0" in name:
                parameter.mul_(-20)
        purified = model.reconstruction(*tikhonov_split(images, load_bundle(training.bundle).config.tikhonov))
        kept = (digits.model(purified).argmax(1) == labels).float().mean()
    assert kept < 0.8
    loss = objective.loss(images, labels, recipes, 0 * share, noise)
    (gradient,) = torch.autograd.grad(loss, model.dual)
    assert (gradient < 0) == rises


def test_the_multiplier_falls_where_nothing_is_lost(make, digits):
    training = make(loss=LossConfig(clean_drop=0.005))
    model = training.build()
    objective = training.objective(model, model, ())
    images, labels, recipes, share, noise = rows_of(digits)
    with torch.no_grad():
        purified = model.reconstruction(*tikhonov_split(images, load_bundle(training.bundle).config.tikhonov))
    kept = digits.model(purified).argmax(1) == labels
    assert kept.sum() > 10
    columns = (column[kept] for column in (images, labels, recipes, 0 * share, noise))
    (gradient,) = torch.autograd.grad(objective.loss(*columns), model.dual)
    assert gradient > 0


@pytest.mark.parametrize(("clean_drop", "rises"), [(-1.0, True), (1.0, False)])
def test_the_multiplier_moves_while_training(make, unit_rows, clean_drop, rises):
    training = make(loss=LossConfig(clean_drop=clean_drop), optimizer={"epochs": 4, "peak_lr": 0.02})
    stepper, objective = begin(training)
    values = [1.0]
    for _ in run(training, stepper, objective, unit_rows):
        values.append(stepper.model.multiplier().item())
    steps = np.diff(values)
    assert ((steps > 0) == rises).all()


@pytest.mark.parametrize("sharing", SHARINGS)
def test_training_learns_and_protects(make, unit_rows, digits, sharing):
    training = make(sharing=sharing, optimizer={"epochs": 9, "peak_lr": 0.02})
    stepper, objective = begin(training)
    images, labels = digits.images, digits.labels
    generator = torch.Generator().manual_seed(9)
    noise = torch.randn(images.shape, generator=generator)
    attacked = attack_pairs(
        digits.model, images, labels, Recipe(0, 2, False, 4), torch.ones(120), noise, training.pairs
    )

    def right(shown):
        bundle = training.trained(stepper.weights())
        with torch.no_grad():
            return (digits.model(Purifier(bundle)(shown)).argmax(1) == labels).float().mean().item()

    before = right(attacked)
    found = [loss.item() for _, loss in run(training, stepper, objective, unit_rows)]
    assert len(found) == 45
    assert np.mean(found[-8:]) < 0.7 * np.mean(found[:8])
    bare = (digits.model(attacked).argmax(1) == labels).float().mean().item()
    after = right(attacked)
    # Measured: 1 % bare, 32 % by the low band that the start amounts to, 51 to 59 % when trained.
    assert bare < 0.1
    assert after > before + 0.1


@pytest.mark.parametrize(("sharing", "stop"), [("global", 1), ("thresholds", 5), ("filters", 8)])
def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(make, unit_rows, sharing, stop, tmp_path):
    schedule = "cosine" if stop == 5 else "one_cycle"
    training = make(sharing=sharing, optimizer={"ema_decay": 0.9, "schedule": schedule, "weight_decay": 0.01})
    whole, objective = begin(training)
    expected = [loss.item() for _, loss in run(training, whole, objective, unit_rows)]
    assert len(expected) == 10
    first, objective = begin(training)
    for number, (batch, _) in enumerate(run(training, first, objective, unit_rows), start=1):
        at = batch.step
        if number == stop:
            over = at.index + 1 == ORDER.steps(at.epoch)
            position = Position(at.epoch + over, 0 if over else at.index + 1, number)
            save_checkpoint(tmp_path / "c", first, position, "me")
            break
    kinds = {name.split(".")[1] for name in first.tensors() if name.startswith("optimizer.")}
    assert kinds == {"step", "exp_avg", "exp_avg_sq"}
    second, objective = begin(training)
    position = read_checkpoint(tmp_path / "c", "me").position
    restore_checkpoint(tmp_path / "c", second, position)
    rest = run(training, second, objective, unit_rows, (position.epoch, position.step))
    assert [loss.item() for _, loss in rest] == expected[stop:]
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name
    # Without the moments it would be another run.
    third, objective = begin(training)
    kept = {name: tensor for name, tensor in first.tensors().items() if "optimizer." not in name}
    third.restore(kept, stop)
    forgetful = [
        loss.item() for _, loss in run(training, third, objective, unit_rows, (position.epoch, position.step))
    ]
    assert forgetful != expected[stop:]


def test_accumulated_parts_give_the_step_of_the_whole_batch(make, unit_rows):
    whole, cut = (losses(make(optimizer={"accumulate": parts}), unit_rows) for parts in (1, 4))
    assert cut == pytest.approx(whole, rel=2e-2)
    assert cut[0] == pytest.approx(whole[0], rel=1e-4)
    assert cut != whole


def test_the_gradient_is_clipped(make, unit_rows):
    free, clipped = (make(optimizer={"clip_norm": norm}) for norm in (None, 1e-3))
    for training in (free, clipped):
        stepper, objective = begin(training)
        next(run(training, stepper, objective, unit_rows))
        norm = torch.stack([p.grad.norm() for p in stepper.model.parameters()]).norm().item()
        assert (norm <= 1.001e-3) == (training is clipped)


def test_the_surrogate_and_the_images_are_left_alone(make, unit_rows, digits):
    training = make()
    stepper, objective = begin(training)
    before = [tensor.clone() for tensor in objective.surrogates[0].state_dict().values()]
    for _ in run(training, stepper, objective, unit_rows):
        pass
    after = objective.surrogates[0].state_dict().values()
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert not any(p.requires_grad or p.grad is not None for p in objective.surrogates[0].parameters())


def test_the_control_of_random_noise_is_trained_likewise(make, unit_rows):
    adversarial = losses(make(), unit_rows)
    gaussian = losses(make(pairs=PairConfig(kind="gaussian", relative_l2=0.15)), unit_rows)
    assert np.mean(gaussian) < np.mean(adversarial)
    assert gaussian[-1] < gaussian[0]


def test_several_surrogates_take_turns(make, unit_rows):
    one = make()
    two = make(surrogates=one.surrogates * 2)
    stepper, objective = begin(two)
    assert len(objective.surrogates) == 2
    numbers = set()
    for batch, _ in run(two, stepper, objective, unit_rows):
        numbers.add(draw_pairs(batch, two.pairs, 2, two.seed).recipe.surrogate)
    assert numbers == {0, 1}


@pytest.mark.parametrize("sharing", ["global", "thresholds"])
def test_a_shared_layer_starts_from_the_atoms_that_differ_most(make, tiny_bundle, sharing):
    bundle = load_bundle(tiny_bundle)
    atoms = starting_atoms(bundle, make(sharing=sharing))
    assert torch.equal(atoms, spread_atoms(bundle.atoms, 12)[None])


@pytest.mark.parametrize("count", [8, 3])
def test_filters_start_from_each_clusters_own_dictionary(make, tiny_bundle, count):
    bundle = load_bundle(tiny_bundle)
    atoms = starting_atoms(bundle, make(sharing="filters", atoms=count))
    assert atoms.shape == (4, count, 3, 5, 5)
    for own, chosen in zip(bundle.atoms, atoms, strict=True):
        rows = [row.tolist() for row in own.flatten(1)]
        found = [rows.index(row.tolist()) for row in chosen.flatten(1)]
        assert len(set(found)) == count
    network = make(sharing="filters", atoms=count).build().reconstruction
    for position, chosen in enumerate(atoms):
        start = network.state_dict()[f"members.{position}.synthesis.0.0"]
        assert torch.equal(start[:, :3], chosen)


@pytest.mark.parametrize(("sharing", "count"), [("filters", 9), ("global", 33), ("thresholds", 33)])
@pytest.mark.parametrize("init", ["dictionary", "random"])
def test_more_atoms_than_there_are_cannot_be_had(make, sharing, count, init):
    with pytest.raises(ValueError, match=f"{count} atoms cannot be chosen from {count - 1}"):
        make(sharing=sharing, atoms=count, init=init).build()


@pytest.mark.parametrize("sharing", SHARINGS)
def test_random_atoms_are_unlearnt_and_the_same_for_all(make, tiny_bundle, sharing):
    bundle = load_bundle(tiny_bundle)

    def start(init, seed=0):
        return starting_atoms(bundle, make(sharing=sharing, init=init, atoms=6, seed=seed))

    learnt, drawn = start("dictionary"), start("random")
    assert drawn.shape == learnt.shape
    torch.testing.assert_close(drawn.flatten(2).norm(dim=2), torch.ones(drawn.shape[:2]))
    assert all(torch.equal(one, drawn[0]) for one in drawn)
    assert torch.equal(start("random"), drawn)
    assert not torch.equal(start("random", 1), drawn)
    known = bundle.atoms.flatten(0, 1).flatten(1)
    assert (drawn[0].flatten(1) @ known.T).abs().max() < 0.9
    assert (learnt[0].flatten(1) @ known.T).abs().max() > 0.999


def test_only_the_first_layer_differs_between_learnt_and_random_atoms(make):
    learnt, drawn = (make(init=init).build().state_dict() for init in ("dictionary", "random"))
    first = {name for name in learnt if not torch.equal(learnt[name], drawn[name])}
    assert first
    assert all(".analysis.0." in n or ".synthesis.0." in n or n.endswith((".step", ".unit")) for n in first)


def test_random_atoms_train_otherwise(make, unit_rows):
    assert losses(make(init="random"), unit_rows) != losses(make(), unit_rows)


def test_the_seed_decides_the_start(make):
    one, same, other = (make(seed=seed).build().state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_what_was_trained_is_a_bundle(make, tiny_bundle, sharing, tmp_path, digits):
    training = make(sharing=sharing)
    model = training.build()
    assert isinstance(model, ConstrainedPurifier)
    bundle = training.trained(model.state_dict())
    assert bundle.config.reconstruction == "unrolled"
    assert bundle.config.unrolled == training.network_config
    assert bundle.reconstruction.keys() == model.reconstruction.state_dict().keys()
    save_bundle(tmp_path / "new", bundle, {})
    purified = Purifier.load(tmp_path / "new")(digits.images[:5])
    assert torch.equal(purified, Purifier(bundle)(digits.images[:5]))
    # The rest is the old bundle's.
    old = load_bundle(tiny_bundle)
    assert torch.equal(bundle.atoms, old.atoms)
    assert bundle.with_reconstruction("cbpdn").config.cbpdn == old.config.cbpdn
    # A bundle that has a network gets the new one.
    again = make(bundle=tmp_path / "new", sharing="global", network={"iterations": 1})
    assert again.trained(again.build().state_dict()).config.unrolled.iterations == 1


def test_closing_metrics_are_accuracies_of_the_surrogates(make, digits, held_out):
    training = make()
    model = training.build()
    metrics = training.closing_metrics(model, held_out, "cpu")
    bundle = training.trained(model.state_dict())
    behind = torch.nn.Sequential(Purifier(bundle), digits.model)
    labels = digits.labels.numpy()
    assert metrics["validation_images"] == 120
    assert metrics["multiplier"] == pytest.approx(1)
    assert metrics["surrogates_clean"] == pytest.approx(accuracy(digits.model(digits.images), labels))
    purified = accuracy(predict(behind, held_out.pixels), labels)
    assert metrics["surrogates_purified_clean"] == pytest.approx(purified)
    assert metrics["surrogates_attacked"] < metrics["surrogates_clean"] - 0.2
    _, highpass = tikhonov_split(digits.images, bundle.config.tikhonov)
    assert metrics[NOISE] == pytest.approx(noise_level(highpass).median().item(), rel=1e-5)
    assert metrics[NOISE] > 0.001
    responses = Purifier(bundle).response(digits.images)
    assert metrics[RESPONSE] > 0
    assert (responses <= metrics[RESPONSE]).double().mean().item() == pytest.approx(USUAL, abs=0.01)
    threat = ThreatModel("linf", training.pairs.linf)
    shown = attack_pixels(digits.model, held_out.pixels, labels, threat)
    images = torch.from_numpy(shown).permute(0, 3, 1, 2) / 255
    seen = Purifier(bundle).response(images) > metrics[RESPONSE]
    assert metrics[BEYOND] == pytest.approx(seen.double().mean().item())
    # Twice the same surrogate has its accuracy.
    twice = make(surrogates=training.surrogates * 2).closing_metrics(model, held_out, "cpu")
    assert twice == pytest.approx(metrics)


def test_strength_auto_is_one_at_the_noise_of_validation_images(make):
    training = make()
    weights = training.build().state_dict()
    old = load_bundle(training.bundle).config.auto_strength
    changed = training.trained(weights, {NOISE: 0.03}).config
    assert changed.auto_strength == old.model_copy(update={"reference": 0.03})
    for unknown in (None, {}, {NOISE: 0.0}):
        assert training.trained(weights, unknown).config.auto_strength == old


def test_auto_goes_by_the_response_where_that_tells_attacked_images(make):
    training = make()
    weights = training.build().state_dict()
    for share, telling in ((TELLING, True), (TELLING - 0.01, False)):
        metrics = {NOISE: 0.03, RESPONSE: 1.4, BEYOND: share}
        config = training.trained(weights, metrics).config
        assert config.auto_by_response == (AutoStrength(reference=1.4, **BY_RESPONSE) if telling else None)
        assert config.strength == 1
        for strength in (1.5, "auto"):
            assert training.trained(weights, metrics, strength).config.strength == strength
        assert config.with_reconstruction("cbpdn").strength == 1


def test_a_training_is_told_from_another(make):
    descriptions = [
        make(**changes).describe()
        for changes in (
            {},
            {"sharing": "filters"},
            {"init": "random"},
            {"seed": 6},
            {"loss": LossConfig(pixel=1)},
        )
    ]
    assert all(one not in descriptions[:number] for number, one in enumerate(descriptions))
    assert PurifierTraining.from_description(descriptions[1]) == make(sharing="filters")


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [(LossConfig, "pixel", -1), (LossConfig, "consistency", -0.1), (LossConfig, "clean_drop", 1.5)],
)
def test_settings_out_of_range(kind, field, value):
    with pytest.raises(ValidationError, match=field):
        kind(**{field: value})


def test_half_precision_is_close(make, unit_rows):
    exact, half = (
        losses(make(sharing="filters", optimizer={"precision": kind}), unit_rows)
        for kind in ("float32", "bfloat16")
    )
    assert half == pytest.approx(exact, rel=0.1)
    assert half != exact


@pytest.fixture
def process_group():
    """A group of one process, enough for all that distributed training asks of a network."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("sharing", SHARINGS)
def test_it_can_be_distributed(make, unit_rows, sharing, process_group):
    training = make(sharing=sharing)
    expected = losses(training, unit_rows)
    model = training.build()
    network = torch.nn.parallel.DistributedDataParallel(training.network(model))
    stepper = Stepper(model, training.optimizer, 10, network)
    objective = training.objective(model, network, ())
    found = [loss.item() for _, loss in run(training, stepper, objective, unit_rows)]
    assert found == pytest.approx(expected, rel=1e-5)
