"""Parameter groups and learning-rate schedules."""

import math

import pytest
import torch

import zoo
from zoo.kernels.errors import ConfigError
from zoo.mixer import scale_learning_rate
from zoo.train.module import SequenceModule
from zoo.train.optim import OptimConfig, build_optimizer, learning_rate_factor, parameter_groups


def small(**settings) -> zoo.Model:
    return zoo.create_model("mamba", vocab_size=11, d_model=16, n_layers=1, **settings)


def test_groups_split_by_decay_and_by_the_rates_that_mixers_mark():
    model = small()
    mixer = model.blocks[0].mixers[0]
    scale_learning_rate(3, mixer.dt_proj.bias)
    scale_learning_rate(0.5, mixer.in_proj.weight)
    groups = parameter_groups(model, OptimConfig(lr=0.1, weight_decay=0.2))
    found = {name: (g["weight_decay"], g["lr"]) for g in groups for name in g["names"]}
    assert found.keys() == dict(model.named_parameters()).keys()
    odd = {"blocks.0.mixers.0.dt_proj.bias": (0, pytest.approx(0.3)), "blocks.0.mixers.0.in_proj.weight": (0.2, 0.05)}
    for name, (decay, lr) in found.items():
        assert (decay, lr) == odd.get(name, (0 if name in model.no_weight_decay() else 0.2, 0.1)), name
    assert all(p is model.get_parameter(n) for g in groups for n, p in zip(g["names"], g["params"], strict=True))
    assert (groups[0]["weight_decay"], groups[0]["lr"]) == (0.2, 0.05)


def test_the_schedule_keeps_the_ratio_of_the_rates():
    model = small()
    scale_learning_rate(2, model.blocks[0].mixers[0].A_log)
    config = OptimConfig(lr=0.5, warmup_steps=0)
    optimizer, scheduler = build_optimizer(model, config, 10, fused=False)
    for step in range(1, 4):
        optimizer.step()
        scheduler.step()
        rate = 0.5 * learning_rate_factor(step, config, 10)
        assert {round(g["lr"] / rate, 9) for g in optimizer.param_groups} == {1.0, 2.0}


def test_frozen_parameters_are_in_no_group():
    model = small()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "norm.weight")
    assert [g["names"] for g in parameter_groups(model, OptimConfig(lr=1))] == [["norm.weight"]]


@pytest.mark.parametrize("arch", zoo.list_models())
def test_every_parameter_is_in_one_group_and_what_must_not_decay_does_not(arch):
    model = zoo.create_model(arch, vocab_size=11, d_model=16, n_layers=1)
    optimizer, _ = build_optimizer(model, OptimConfig(lr=1e-3), 10, fused=True)
    decays = {name: g["weight_decay"] for g in optimizer.param_groups for name in g["names"]}
    assert decays.keys() == dict(model.named_parameters()).keys()
    exempt = ("bias", "norm", "embedding", "A_log", ".D")
    for name, decay in decays.items():
        shape = model.get_parameter(name).shape
        if any(part in name for part in exempt):
            assert decay == 0, name
        elif len(shape) == 2 and name not in model.no_weight_decay():
            assert decay == 0.1, name


def test_mamba_names_what_does_not_decay():
    model = zoo.create_model("mamba", vocab_size=11, d_model=16, n_layers=1)
    mixer = "blocks.0.mixers.0."
    assert {mixer + "A_log", mixer + "D", mixer + "dt_proj.bias", "embedding.weight", "norm.weight"} <= (
        model.no_weight_decay()
    )
    assert mixer + "in_proj.weight" not in model.no_weight_decay()


def rates(config: OptimConfig, steps: int) -> list[float]:
    return [learning_rate_factor(step, config, steps) for step in range(steps)]


def test_warm_up_is_linear_and_ends_at_the_peak():
    assert rates(OptimConfig(warmup_steps=4), 100)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_warm_up_takes_at_most_a_tenth_of_a_short_run():
    assert rates(OptimConfig(warmup_steps=100), 20)[:3] == [0.5, 1.0, 1.0]


def test_cosine_is_half_way_down_in_the_middle_and_ends_at_the_floor():
    config = OptimConfig(schedule="cosine", warmup_steps=0, min_lr_ratio=0.2)
    assert learning_rate_factor(50, config, 100) == pytest.approx(0.6)
    assert learning_rate_factor(25, config, 100) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.sqrt(0.5)))
    assert learning_rate_factor(100, config, 100) == learning_rate_factor(500, config, 100) == pytest.approx(0.2)


def test_wsd_is_flat_until_the_decay_and_linear_in_it():
    config = OptimConfig(schedule="wsd", warmup_steps=10, decay_ratio=0.2, min_lr_ratio=0.0)
    factors = rates(config, 100)
    assert set(factors[9:81]) == {1.0}
    assert factors[90] == pytest.approx(0.5)
    assert learning_rate_factor(100, config, 100) == 0


def test_constant_stays():
    assert set(rates(OptimConfig(schedule="constant", warmup_steps=0), 50)) == {1.0}


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"lr": 0.0}, "lr=0.0 is not valid: expected more than 0"),
        ({"lr": "fast"}, "lr='fast' is not valid: expected a number or null"),
        ({"schedule": "cosin"}, "schedule='cosin' is not valid: did you mean 'cosine'"),
        ({"clip": -1.0}, "clip=-1.0 is not valid: expected more than 0"),
        ({"warmup_steps": -1}, "warmup_steps=-1 is not valid: expected at least 0"),
        ({"beta1": 1.0}, "beta1=1.0 is not valid: expected at most 0.9999"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio=1.5 is not valid: expected at most 1"),
    ],
)
def test_bad_settings_are_one_line(settings, line):
    with pytest.raises(ConfigError, match=line.replace("(", r"\(")):
        OptimConfig(**settings)


def test_the_optimiser_uses_the_settings():
    model = small()
    config = OptimConfig(lr=0.5, beta1=0.8, beta2=0.9, eps=1e-6, warmup_steps=0)
    optimizer, scheduler = build_optimizer(model, config, 10, fused=False)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.8, 0.9), 1e-6)
    before = model.norm.weight.detach().clone()
    model(torch.ones(1, 2, dtype=torch.long)).logits.square().sum().backward()
    optimizer.step()
    scheduler.step()
    assert not torch.equal(before, model.norm.weight)
    assert group["lr"] == pytest.approx(0.5 * learning_rate_factor(1, config, 10))


def test_an_auxiliary_loss_changes_no_gradient_of_what_it_does_not_teach():
    """Not through the norm that the gradient is clipped by either."""
    tokens, found = torch.randint(11, (2, 24)), {}
    common = {"vocab_size": 11, "d_model": 16, "n_layers": 2, "segment": 4, "memory": 4, "compressed_memory": 4}
    weights = zoo.create_model("compressive", **common, loss="autoencoding").state_dict()
    for loss in ("none", "autoencoding"):
        model = zoo.create_model("compressive", **common, loss=loss)
        model.load_state_dict(weights, strict=loss != "none")
        module = SequenceModule(model, OptimConfig(lr=1e-3, clip=0.1), max_steps=1, seed=0)
        optimizer = build_optimizer(model, module.optim, 1, fused=False)[0]
        module.training_step({"inputs": tokens, "targets": tokens.roll(-1, 1)}, 0).backward()
        module.configure_gradient_clipping(optimizer)
        found[loss] = {name: p.grad for name, p in model.named_parameters()}
        told = module.results["train"]
        assert told["grad_norm"] > 0.1, "nothing was clipped"
    assert told["loss"] == told["cross_entropy"] + told["autoencoding"]
    assert all(torch.equal(gradient, found["autoencoding"][name]) for name, gradient in found["none"].items())
    apart = [found["autoencoding"][name] for name in found["autoencoding"].keys() - found["none"].keys()]
    assert len(apart) == 2
    assert torch.nn.utils.get_total_norm(apart).item() == pytest.approx(0.1, rel=1e-3)
