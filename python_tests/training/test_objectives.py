"""The loss against the paper and the authors' procedure, written out in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from toys import Condition
from training.helpers import convolutional, images, labels, parameter_gradients

from grood_fast.batches import Batch, parse_batch
from grood_fast.classifier import Classifier
from grood_fast.errors import InputError
from grood_fast.training.objectives import (
    GradientRegularizer,
    Margins,
    TrainingObjective,
    energy_margin_loss,
    outlier_exposure_loss,
)

INLIERS, OUTLIERS = 6, 8
X, AUX = images(INLIERS), images(OUTLIERS, seed=1) + 0.3
Y = labels(INLIERS)


def batches() -> tuple[Batch, Batch]:
    return parse_batch((X, Y)), parse_batch(AUX)


def energies(model: nn.Module, x: Tensor) -> Tensor:
    return -torch.logsumexp(model(x), dim=1)


def margins(model: nn.Module) -> Margins:
    """Margins that some samples of each kind keep and others do not."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        found = energies(model, torch.cat([X, AUX]))
    medians = [part.median().item() for part in (found[:INLIERS], found[INLIERS:])]
    margins = Margins(min(medians), max(medians))
    met = margins.met(found, INLIERS)
    assert 0 < met[:INLIERS].sum() < INLIERS
    assert 0 < met[INLIERS:].sum() < OUTLIERS
    return margins


def outlier_terms(model: nn.Module, m: Margins) -> Tensor:
    """L_S, one sample at a time."""
    inside = [F.relu(energies(model, x[None]) - m.inside) ** 2 for x in X]
    outside = [F.relu(m.outside - energies(model, x[None])) ** 2 for x in AUX]
    return torch.cat(inside).mean() + torch.cat(outside).mean()


def paper_penalty(model: nn.Module, m: Margins) -> Tensor:
    """L_gradS of a network in which samples do not meet, one sample at a time."""

    def mean(samples: Tensor, keeps: object) -> Tensor:
        norms = []
        for x in samples:
            x = x[None].detach().requires_grad_()
            (energy,) = energies(model, x)
            (gradient,) = torch.autograd.grad(energy, x, create_graph=True)
            norms.append(gradient.norm() if keeps(energy) else torch.zeros((), dtype=x.dtype))
        return torch.stack(norms).mean()

    return mean(X, lambda s: s <= m.inside) + mean(AUX, lambda s: s >= m.outside)


def authors_penalty(model: nn.Module, m: Margins) -> Tensor:
    """What the authors' program adds: norms of the rows of a gradient of batch means, averaged."""
    x = torch.cat([X, AUX]).requires_grad_()
    found = energies(model, x)
    scalar = F.relu(found[INLIERS:] - m.outside).mean() - F.relu(m.inside - found[:INLIERS]).mean()
    (gradient,) = torch.autograd.grad(scalar, x, create_graph=True)
    return (gradient.flatten(1).square().sum(dim=1) + 1e-20).sqrt().mean()


@pytest.mark.parametrize("norm", ["group", "none"])
def test_the_whole_loss_is_the_papers(norm: str) -> None:
    model = convolutional(norm)
    m = margins(model)
    regularizer = GradientRegularizer(0.7, scale="paper", epsilon=1e-20)
    objective = TrainingObjective("energy", 0.1, m, regularizer)
    expected = parameter_gradients(
        model,
        lambda: (
            F.cross_entropy(model(X), Y)
            + 0.1 * outlier_terms(model, m)
            + 0.7 * paper_penalty(model, m)
        ),
    )
    actual = parameter_gradients(model, lambda: objective(Classifier(model), *batches()).total)
    assert_close(actual, expected, rtol=1e-8, atol=1e-9)


def test_without_batch_norm_the_authors_penalty_is_the_papers_over_the_batch() -> None:
    model = convolutional("group")
    m = margins(model)
    expected = parameter_gradients(model, lambda: authors_penalty(model, m))
    by_paper = parameter_gradients(model, lambda: paper_penalty(model, m) / (INLIERS + OUTLIERS))
    assert_close(by_paper, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("outliers", ["energy", "oe"])
def test_with_batch_norm_in_training_mode_it_is_the_authors_procedure(outliers: str) -> None:
    model = convolutional("batch")
    m = margins(model)
    objective = TrainingObjective(outliers, 0.1, m, GradientRegularizer(3.0, epsilon=1e-20))

    def literal() -> Tensor:
        logits = model(torch.cat([X, AUX]))
        found = -torch.logsumexp(logits, dim=1)
        loss = F.cross_entropy(logits[:INLIERS], Y)
        if outliers == "energy":
            loss = loss + 0.1 * (
                F.relu(found[:INLIERS] - m.inside).pow(2).mean()
                + F.relu(m.outside - found[INLIERS:]).pow(2).mean()
            )
        else:
            loss = loss - 0.1 * F.log_softmax(logits[INLIERS:], dim=1).mean()
        return loss + 3.0 * authors_penalty(model, m)

    expected = parameter_gradients(model, literal)
    actual = parameter_gradients(model, lambda: objective(Classifier(model), *batches()).total)
    assert_close(actual, expected, rtol=1e-8, atol=1e-9)


def test_frozen_statistics_give_each_sample_its_own_gradient() -> None:
    model = convolutional("batch")
    model(images(64, seed=5))  # running statistics of something
    evaluated = copy.deepcopy(model)
    evaluated(torch.cat([X, AUX]))  # the loss' own forward pass comes first and moves them
    evaluated.eval()
    m = margins(model)
    regularizer = GradientRegularizer(1.0, "paper", batch_norm="frozen", epsilon=1e-20)
    objective = TrainingObjective("energy", 0.1, m, regularizer)
    with torch.no_grad():
        met = m.met(energies(copy.deepcopy(model), torch.cat([X, AUX])), INLIERS)

    def literal() -> Tensor:
        norms = []
        for x in torch.cat([X, AUX]):
            x = x[None].detach().requires_grad_()
            (gradient,) = torch.autograd.grad(energies(evaluated, x), x, create_graph=True)
            norms.append(gradient.norm())
        kept = torch.stack(norms) * met
        return kept[:INLIERS].mean() + kept[INLIERS:].mean()

    expected = parameter_gradients(evaluated, literal)
    actual = parameter_gradients(
        model, lambda: objective(Classifier(model), *batches()).parts["gradient"]
    )
    assert_close(actual, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_finite_difference_comes_close(batch_norm: str, dropout: float) -> None:
    model = convolutional("batch", dropout)
    model[2] = nn.Softplus()  # smooth, so that the difference has a limit
    m = Margins(-0.5, -0.5)

    def penalty(form: str, model: nn.Module) -> Tensor:
        torch.manual_seed(11)
        regularizer = GradientRegularizer(1.0, "paper", form, batch_norm, 1e-20, step=1e-5)
        objective = TrainingObjective("energy", 0.1, m, regularizer)
        terms = objective(Classifier(model), *batches())
        assert terms.met_in + terms.met_out > 0
        return terms.parts["gradient"]

    one, other = copy.deepcopy(model), copy.deepcopy(model)
    expected = parameter_gradients(one, lambda: penalty("input", one))
    actual = parameter_gradients(other, lambda: penalty("finite_difference", other))
    assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_the_feature_surrogate_is_the_energy_gradient_at_the_features() -> None:
    model = convolutional("batch")
    m = margins(model)
    regularizer = GradientRegularizer(1.0, "paper", "features", epsilon=1e-20)
    objective = TrainingObjective("energy", 0.1, m, regularizer)

    def literal() -> Tensor:
        features = model[:-1](torch.cat([X, AUX]))
        logits = model[-1](features)
        found = -torch.logsumexp(logits, dim=1)
        (gradient,) = torch.autograd.grad(found.sum(), features, create_graph=True)
        norms = gradient.norm(dim=1) * m.met(found, INLIERS)
        return norms[:INLIERS].mean() + norms[INLIERS:].mean()

    expected = parameter_gradients(model, literal)
    actual = parameter_gradients(
        model, lambda: objective(Classifier(model), *batches()).parts["gradient"]
    )
    assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_each_sample_feeds_exactly_one_of_the_two_terms() -> None:
    m = Margins(-3.0, -1.0)
    for value in (-4.0, -3.0, -2.999, -1.001, -1.0, 0.0):
        for inliers in (0, 1):  # is the sample an outlier or ID?
            energy = torch.tensor([value], dtype=torch.float64, requires_grad=True)
            kept = m.met(energy, inliers).item()
            padded = (
                torch.cat([energy, energy.new_tensor([0.0])])
                if inliers
                else torch.cat([energy.new_tensor([-9.0]), energy])
            )
            (slope,) = torch.autograd.grad(energy_margin_loss(padded, 1, m), energy)
            assert (slope == 0).item() == kept, (value, inliers)


def test_energy_loss_and_outlier_exposure_by_hand() -> None:
    found = torch.tensor([-5.0, -1.0, -4.0, 2.0])
    assert energy_margin_loss(found, 2, Margins(-3.0, -2.0)).item() == (0 + 4) / 2 + (4 + 0) / 2
    logits = torch.tensor([[1.0, 1.0], [3.0, 0.0]])
    uniform = torch.full((2, 2), 0.5)
    assert_close(outlier_exposure_loss(logits), F.cross_entropy(logits, uniform))


def test_accumulated_batches_make_the_loss_of_the_whole() -> None:
    model = convolutional("group")
    m = margins(model)
    objective = TrainingObjective("energy", 0.1, m, GradientRegularizer(2.0))
    classifier = Classifier(model)
    expected = parameter_gradients(model, lambda: objective(classifier, *batches()).total)

    def halves() -> Tensor:
        losses = [
            objective(
                classifier, parse_batch((X[i::2], Y[i::2])), parse_batch(AUX[i::2]), batches=2
            ).total
            for i in range(2)
        ]
        return torch.stack(losses).mean()

    assert_close(parameter_gradients(model, halves), expected, rtol=1e-9, atol=1e-11)


def test_no_sample_keeps_its_margin() -> None:
    model = convolutional()
    objective = TrainingObjective("energy", 0.1, Margins(-99, 99), GradientRegularizer())
    terms = objective(Classifier(model), *batches())
    assert (terms.met_in, terms.met_out, terms.parts["gradient"]) == (0, 0, 0)
    terms.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("form", ["input", "finite_difference"])
def test_bf16_takes_the_gradient_in_float32(form: str) -> None:
    model = convolutional().float()
    inliers, outliers = parse_batch((X.float(), Y)), parse_batch(AUX.float())
    m = Margins(-0.5, -0.5)
    penalties = []
    for precision in ("fp32", "bf16"):
        before = {name: tensor.clone() for name, tensor in model.named_buffers()}
        objective = TrainingObjective("energy", 0.1, m, GradientRegularizer(form=form))
        terms = objective(Classifier(model), inliers, outliers, precision=precision)
        assert terms.total.dtype == torch.float32
        penalties.append(terms.parts["gradient"].item())
        assert model[1].num_batches_tracked == before["1.num_batches_tracked"] + 1
    assert penalties[1] == pytest.approx(penalties[0], rel=0.3)


def test_the_model_is_left_as_it_was() -> None:
    model = convolutional().train()
    model[4].eval()
    condition = Condition(model)
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}
    for batch_norm in ("frozen", "train"):
        for form in ("input", "finite_difference", "features"):
            objective = TrainingObjective(
                "energy", 0.1, Margins(0, 0), GradientRegularizer(form=form, batch_norm=batch_norm)
            )
            objective(Classifier(model), *batches())
    with torch.no_grad():
        for name, tensor in model.named_buffers():
            if name.startswith("1."):
                assert not torch.equal(tensor, buffers[name])
                tensor.copy_(buffers[name])
    condition.assert_same(model)


def test_inputs_that_cannot_be_trained_on() -> None:
    model = convolutional()
    classifier = Classifier(model)
    objective = TrainingObjective(regularizer=GradientRegularizer())
    with pytest.raises(InputError, match="training needs class labels"):
        objective(classifier, parse_batch(X), parse_batch(AUX))
    with pytest.raises(InputError, match="needs a batch of outliers"):
        objective(classifier, parse_batch((X, Y)))
    with pytest.raises(InputError, match=r"cannot be joined: one is .*\(6, 3, 8, 8\), the other"):
        objective(classifier, parse_batch((X, Y)), parse_batch(AUX[:, :2]))
    with pytest.raises(InputError, match=r'no input .* floating point.*form="features"'):
        objective(classifier, parse_batch((X.long(), Y)), parse_batch(AUX.long()))
    for wrong in ({"weight": 0}, {"epsilon": 0}, {"step": -1}, {"form": "x"}, {"scale": "x"}):
        with pytest.raises(InputError):
            GradientRegularizer(**wrong)
    with pytest.raises(InputError, match="must not lie above"):
        Margins(-1, -2)
    with pytest.raises(InputError, match="needs outliers"):
        TrainingObjective(None, regularizer=GradientRegularizer())
    with pytest.raises(InputError, match="'x'"):
        TrainingObjective("x")
