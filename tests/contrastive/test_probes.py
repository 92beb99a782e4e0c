"""Probes: scikit-learn's neighbours and logistic regression on its own digits."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch.testing import assert_close

from implementations.contrastive.probes import fit_linear, linear_probe, nearest_neighbours
from implementations.sources.images import digits


@pytest.fixture(scope="module")
def data():
    """300 training and 360 test digits with a little noise: no two distances tie."""
    train, test = digits().split()
    generator = torch.Generator().manual_seed(0)
    sets = []
    for part, step in ((train, 5), (test, 1)):
        pixels = part.pixels[::step].flatten(1).double()
        noise = torch.randn(pixels.shape, generator=generator, dtype=torch.float64)
        sets += [pixels + noise, part.labels[::step]]
    return sets


@pytest.mark.parametrize("neighbours", [1, 5])
def test_neighbours_are_scikit_learns(data, neighbours):
    """To the last test digit: of tied votes both take the lowest label."""
    train, labels, test, test_labels = data
    theirs = KNeighborsClassifier(neighbours, metric="cosine").fit(train, labels)
    ours = nearest_neighbours(*data, neighbours=neighbours)
    assert ours == theirs.score(test, test_labels)
    assert 0.8 < ours < 1


def test_the_linear_fit_is_scikit_learns(data):
    """The minimum is unique but for a shift of all biases: scores agree within 1e-4 of their size,
    which is what gradients of 1e-7 over penalties of 1e-2 allow."""
    train, labels = (data[0] - data[0].mean(0)) / 6, data[1]
    weight, bias = fit_linear(train, labels, penalty=0.01)
    theirs = LogisticRegression(C=1 / (0.01 * len(train)), tol=1e-8, max_iter=5000)
    theirs.fit(train, labels)
    assert_close(weight, torch.from_numpy(theirs.coef_), rtol=0, atol=1e-4)
    shift = bias - torch.from_numpy(theirs.intercept_)
    assert_close(shift - shift.mean(), torch.zeros(10).double(), rtol=0, atol=1e-4)


def test_the_probes_accuracy_is_scikit_learns(data):
    train, labels, test, test_labels = data
    scaler = StandardScaler().fit(train)
    # Ours divides by the spread of a sample, theirs of a population: 0.2% of a feature's size.
    theirs = LogisticRegression(C=1 / (1e-3 * len(train)), max_iter=5000)
    theirs.fit(scaler.transform(train), labels)
    score = theirs.score(scaler.transform(test), test_labels)
    assert abs(linear_probe(*data) - score) <= 1 / len(test)


def test_a_probe_sees_what_is_linear_and_nothing_else():
    """Labels by sign are read off. By the sign of a product, (x, y), (-x, y), (x, -y), (-x, -y)
    alternate, and a line is right about three of the four at most."""
    x = torch.randn(4000, 2, dtype=torch.float64)
    for labels, low, high in (
        ((x[:, 0] > 0).long(), 0.98, 1.0),
        ((x.prod(1) > 0).long(), 0.0, 0.75),
    ):
        assert low <= linear_probe(x[:2000], labels[:2000], x[2000:], labels[2000:]) <= high


def test_a_row_is_judged_alone(data):
    """The accuracy over the test is the mean of those of its parts, whatever else is in them."""
    train, labels, test, test_labels = data
    parts = [test_labels < 5, test_labels >= 5]
    alone = [linear_probe(train, labels, test[p], test_labels[p]) * p.sum().item() for p in parts]
    assert sum(alone) / len(test) == pytest.approx(linear_probe(*data), abs=1e-12)


def test_a_feature_that_never_changes_is_harmless(data):
    train, labels, test, test_labels = data
    wider = [torch.cat([x, torch.ones(len(x), 1).double()], 1) for x in (train, test)]
    assert linear_probe(wider[0], labels, wider[1], test_labels) == linear_probe(*data)


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda x, y: nearest_neighbours(x, y, x, y, neighbours=0), "cannot give 0"),
        (lambda x, y: nearest_neighbours(x, y, x, y, neighbours=9), "8 rows cannot give 9"),
        (lambda x, y: nearest_neighbours(x, y[:3], x, y), "training rows need a label each"),
        (lambda x, y: linear_probe(x, y, x[:0], y[:0]), "test rows need a label each"),
        (lambda x, y: linear_probe(x, y, x, y, penalty=0.0), "penalty is positive, got 0.0"),
    ],
)
def test_bad_input(call, sentence, unchecked):
    with pytest.raises(ValueError, match=sentence):
        call(torch.randn(8, 3), torch.arange(8) % 2)
